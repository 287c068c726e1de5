"""Batches of tokens, in an order that depends on the seed and the epoch alone, so that training can go on anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LanguageModelBatches:
    """Windows of a text, each with the tokens that follow.

    Attributes:
        tokens: (tokens,) int64.
        batch_size: windows a batch.
        length: tokens a window.
    """

    tokens: Tensor
    batch_size: int
    length: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.length * self.batch_size:
            needed = self.length * self.batch_size + 1
            raise ValueError(f"tokens: expected at least {needed} for a batch of windows, got {len(self.tokens)}")

    def __len__(self) -> int:
        """Batches an epoch."""
        return (len(self.tokens) - 1) // (self.length * self.batch_size)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, counted from 0 over all epochs: (batch_size, length) int64 each."""
        epoch, index = divmod(step, len(self))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        # windows begin elsewhere in every epoch, so that no word is the first of its window every time
        spare = len(self.tokens) - 1 - len(self) * self.batch_size * self.length
        shift = int(torch.randint(min(spare + 1, self.length), (), generator=generator))
        order = torch.randperm(len(self) * self.batch_size, generator=generator)
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        positions = shift + chosen[:, None] * self.length + torch.arange(self.length)  # (batch_size, length)
        return self.tokens[positions], self.tokens[positions + 1]


@dataclass(frozen=True)
class ClassificationBatches:
    """Texts and their classes, padded to the longest of a batch.

    Attributes:
        texts: (tokens,) int64 each, none of them empty.
        labels: (texts,) int64.
        batch_size: texts a batch.
        max_length: what goes beyond is cut off.
        pad: the token to fill up with.
    """

    texts: Sequence[Tensor]
    labels: Tensor
    batch_size: int
    max_length: int
    pad: int

    def __len__(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-len(self.texts) // self.batch_size)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Texts (batch, longest) and classes (batch,) of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, len(self))
        order = torch.randperm(len(self.texts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return self.collate(order[index * self.batch_size : (index + 1) * self.batch_size].tolist())

    def collate(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The texts of these numbers as one padded batch, and their classes."""
        texts = [self.texts[number][: self.max_length] for number in chosen]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad)
        return padded, self.labels[list(chosen)]
