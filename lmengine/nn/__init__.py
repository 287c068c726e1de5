"""Drop-in layers."""

from lmengine.nn import functional
from lmengine.nn.attention import MultiheadAttention
from lmengine.nn.linear import Linear
from lmengine.nn.recurrent import LSTM

__all__ = ["LSTM", "Linear", "MultiheadAttention", "functional"]
