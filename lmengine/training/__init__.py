"""Pre-training and fine-tuning."""

from lmengine.training.classification import class_scores, finetune
from lmengine.training.language_model import negative_log_likelihood, pretrain, unigram_perplexity
from lmengine.training.loop import History, Interrupted, TrainingConfig, fit

__all__ = [
    "History",
    "Interrupted",
    "TrainingConfig",
    "class_scores",
    "finetune",
    "fit",
    "negative_log_likelihood",
    "pretrain",
    "unigram_perplexity",
]
