"""Fine-tuning: a language model learns to tell classes of texts apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmengine.data import ClassificationBatches
from lmengine.models import SequenceClassifier
from lmengine.training.loop import History, TrainingConfig, fit


def finetune(
    model: SequenceClassifier,
    train: ClassificationBatches,
    test: ClassificationBatches,
    config: TrainingConfig,
    **options: Any,
) -> History:
    """Train a classifier by cross-entropy; evaluations are {"loss", "accuracy"} of `test`.

    Args:
        model: trained in place, backbone and all.
        train, test: labelled texts.
        config, options: see `fit`.
    """

    def loss(step: int) -> Tensor:
        texts, labels = train.batch(step, config.seed)
        return F.cross_entropy(model(texts), labels)

    def evaluate() -> dict[str, float]:
        scores = class_scores(model, test)
        accuracy = (scores.argmax(1) == test.labels).double().mean().item()
        return {"loss": F.cross_entropy(scores, test.labels).item(), "accuracy": accuracy}

    return fit(model, loss, evaluate, config, **options)


@torch.no_grad()
def class_scores(model: SequenceClassifier, data: ClassificationBatches) -> Tensor:
    """The model's scores for all texts, in their order: (texts, labels)."""
    numbers = range(len(data.texts))
    size = data.batch_size
    scores = [model(data.collate(numbers[begin : begin + size])[0]) for begin in range(0, len(numbers), size)]
    return torch.cat(scores)
