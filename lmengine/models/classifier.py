"""A sequence classifier on a language model: the mean of the features of all tokens, and a linear layer.

B: batch, T: length, E: embedding_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmengine import nn
from lmengine.models.language_model import LanguageModel


class SequenceClassifier(torch.nn.Module):
    """Says which class a text is of.

    Args:
        backbone: a language model, fine-tuned along with the layer on top of it.
        labels: the names of the classes.
        pad: the token that fills up short texts; it follows the text, so that no feature depends on it.
        dropout: of the mean.
    """

    def __init__(self, backbone: LanguageModel, labels: list[str], pad: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        self.backbone = backbone
        self.labels = list(labels)
        self.pad = pad
        self.dropout = dropout
        self.head = nn.Linear(backbone.embedding.embedding_dim, len(self.labels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the classes: (B, T) int64 -> (B, labels)."""
        there = (tokens != self.pad).unsqueeze(-1)  # (B, T, 1)
        features = self.backbone.features(tokens) * there
        mean = features.sum(1) / there.sum(1).clamp(min=1)
        return self.head(F.dropout(mean, self.dropout, self.training))
