"""A recurrent language model: embedding, LSTM, output (Mikolov et al. 2010; Zaremba et al. 2014; weights tied).

B: batch, T: length, V: vocabulary_size, E: embedding_dim, H: hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lmengine import nn
from lmengine.models.language_model import LanguageModel


@dataclass(frozen=True)
class RecurrentConfig:
    vocabulary_size: int
    embedding_dim: int = 128
    hidden_size: int = 256
    num_layers: int = 1
    dropout: float = 0.2


class RecurrentLM(LanguageModel):
    """A language model on `lmengine.nn.LSTM`.

    Args:
        config: sizes. `dropout` is applied to the embeddings, between LSTM layers, and before the output.
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config.vocabulary_size, config.embedding_dim)
        self.config = config
        between = config.dropout if config.num_layers > 1 else 0.0
        self.lstm = nn.LSTM(
            config.embedding_dim, config.hidden_size, config.num_layers, batch_first=True, dropout=between
        )
        self.projection = nn.Linear(config.hidden_size, config.embedding_dim)

    def features(self, tokens: Tensor) -> Tensor:
        return self._features(tokens, None)[0]

    def _features(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        embedded = F.dropout(self.embedding(tokens), self.config.dropout, self.training)  # (B, T, E)
        hidden, state = self.lstm(embedded, state)  # (B, T, H)
        features = self.projection(F.dropout(hidden, self.config.dropout, self.training))
        return F.dropout(features, self.config.dropout, self.training), state

    def step(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self._features(tokens, state)
        return self.logits(features[:, -1]), state
