"""Pre-training: a language model learns to say what comes next."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmengine.data import LanguageModelBatches
from lmengine.models import LanguageModel
from lmengine.ops.loss import linear_cross_entropy
from lmengine.training.loop import History, TrainingConfig, fit


def pretrain(
    model: LanguageModel,
    train: LanguageModelBatches,
    validation: Tensor,
    config: TrainingConfig,
    **options: Any,
) -> History:
    """Train a language model by cross-entropy of the next token.

    Args:
        model: trained in place.
        train: the batches.
        validation: (tokens,) int64, text that is not trained on; evaluations are {"loss", "perplexity"} of it.
        config, options: see `fit`.
    """

    def loss(step: int) -> Tensor:
        inputs, targets = train.batch(step, config.seed)  # (batch, length) each
        return _mean_loss(model, inputs, targets)

    def evaluate() -> dict[str, float]:
        found = negative_log_likelihood(model, validation, train.length)
        return {"loss": found, "perplexity": math.exp(found)}

    return fit(model, loss, evaluate, config, **options)


@torch.no_grad()
def negative_log_likelihood(model: LanguageModel, tokens: Tensor, length: int, batch_size: int = 32) -> float:
    """The mean, in nats a token, over all tokens but the first; each is told from at most `length` before it.

    The text is cut into windows of `length`, and a window knows nothing of the one before. The model is to be in
    evaluation mode.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens: expected at least 2, got {len(tokens)}")
    total = 0.0
    whole = (len(tokens) - 1) // length * length
    inputs = tokens[:whole].view(-1, length).split(batch_size)
    targets = tokens[1 : whole + 1].view(-1, length).split(batch_size)
    rest = [(tokens[None, whole:-1], tokens[None, whole + 1 :])] if whole < len(tokens) - 1 else []
    for given, wanted in [*zip(inputs, targets, strict=True), *rest]:
        if given.numel():
            total += _mean_loss(model, given, wanted).item() * given.numel()
    return total / (len(tokens) - 1)


def _mean_loss(model: LanguageModel, inputs: Tensor, targets: Tensor) -> Tensor:
    features = model.features(inputs).flatten(0, 1)
    return linear_cross_entropy(features, model.embedding.weight, model.output_bias, targets.flatten())


def unigram_perplexity(train: Tensor, validation: Tensor, vocabulary_size: int) -> float:
    """The perplexity of a model that knows only how frequent each token is in `train` (each counted once more)."""
    counts = torch.bincount(train, minlength=vocabulary_size).double() + 1
    return math.exp(-(counts / counts.sum()).log()[validation[1:]].mean().item())
