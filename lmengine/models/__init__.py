"""Models built from lmengine.nn."""

from lmengine.models.classifier import SequenceClassifier
from lmengine.models.decoder import Decoder, DecoderConfig
from lmengine.models.folder import load_model, save_model
from lmengine.models.language_model import LanguageModel
from lmengine.models.recurrent import RecurrentConfig, RecurrentLM

__all__ = [
    "Decoder",
    "DecoderConfig",
    "LanguageModel",
    "RecurrentConfig",
    "RecurrentLM",
    "SequenceClassifier",
    "load_model",
    "save_model",
]
