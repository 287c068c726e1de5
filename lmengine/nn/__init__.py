"""Drop-in layers."""

from lmengine.nn import functional
from lmengine.nn.attention import MultiheadAttention
from lmengine.nn.linear import Linear
from lmengine.nn.recurrent import LSTM
from lmengine.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "LSTM",
    "Linear",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]
