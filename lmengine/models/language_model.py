"""What all language models have in common: embedding and output share one matrix, and a model is kept in a folder.

B: batch, T: length, V: vocabulary_size, E: embedding_dim.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from lmengine.ops.matmul import linear


class LanguageModel(torch.nn.Module, abc.ABC):
    """The base class: a subclass defines `features` and, to generate faster than from the start, `step`.

    Attributes:
        embedding: (V, E) weight, tied to the output (Press and Wolf 2017).
        output_bias: (V,).
        context: how many tokens the model can take at once, or None where there is no bound.
    """

    context: int | None = None

    def __init__(self, vocabulary_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary_size, embedding_dim)
        torch.nn.init.normal_(self.embedding.weight, std=embedding_dim**-0.5)
        self.output_bias = torch.nn.Parameter(torch.zeros(vocabulary_size))

    @abc.abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """What stands at each position, from the tokens up to it: (B, T) -> (B, T, E)."""

    def logits(self, features: Tensor) -> Tensor:
        """Scores of the next token: (..., E) -> (..., V)."""
        return linear(features, self.embedding.weight, self.output_bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the token after each position: (B, T) int64 -> (B, T, V)."""
        return self.logits(self.features(tokens))

    def step(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Scores of the token after the last of `tokens`, which go on where `state` ends.

        Args:
            tokens: (B, T) int64.
            state: what the call before returned, None at the start of a text.

        Returns:
            scores (B, V), and the state for the next call.
        """
        seen = tokens if state is None else torch.cat((state, tokens), dim=1)
        if self.context is not None:
            seen = seen[:, -self.context :]
        return self.logits(self.features(seen)[:, -1]), seen

    @torch.no_grad()
    def start_from_vectors(self, vectors: Tensor, rows: Tensor) -> None:
        """Let tokens begin with given word vectors, scaled to the spread that the embedding has at random.

        Args:
            vectors: (words, E).
            rows: (words,) int64, the token of each word.

        Raises:
            ValueError: the vectors are of another size than the embedding.
        """
        weight = self.embedding.weight
        if vectors.dim() != 2 or vectors.shape[1] != weight.shape[1] or len(vectors) != len(rows):
            expected = (len(rows), weight.shape[1])
            raise ValueError(f"vectors: expected shape {expected}, got {tuple(vectors.shape)}")
        centred = vectors - vectors.mean(0)
        weight[rows] = (centred * (weight.std() / centred.std().clamp(min=1e-12))).to(weight)
