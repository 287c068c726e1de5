"""Text: where it comes from, as numbers, in batches."""

from lmengine.data.batches import ClassificationBatches, LanguageModelBatches
from lmengine.data.corpus import Document, held_out, python_corpus, read_corpus
from lmengine.data.tokenizer import WordTokenizer

__all__ = [
    "ClassificationBatches",
    "Document",
    "LanguageModelBatches",
    "WordTokenizer",
    "held_out",
    "python_corpus",
    "read_corpus",
]
