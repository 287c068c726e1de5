"""Classes of texts, from a fine-tuned classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmengine.data import ClassificationBatches, WordTokenizer
from lmengine.models import SequenceClassifier
from lmengine.training import class_scores


@torch.no_grad()
def classify(
    model: SequenceClassifier, tokenizer: WordTokenizer, texts: Sequence[str], max_length: int = 96
) -> list[tuple[str, float]]:
    """The likeliest class of each text, and its probability.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        texts: strings.
        max_length: tokens of a text that are read.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected a sequence of strings, got one string")
    end = torch.tensor([tokenizer.end])
    tokens = [torch.cat((tokenizer.encode(text)[: max_length - 1], end)) for text in texts]
    data = ClassificationBatches(tokens, torch.zeros(len(tokens), dtype=torch.int64), 32, max_length, model.pad)
    if not tokens:
        return []
    best = class_scores(model, data).softmax(1).max(1)
    return [(model.labels[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
