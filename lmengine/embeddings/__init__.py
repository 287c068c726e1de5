"""Word embeddings: text to vocabulary, vocabulary to co-occurrence counts, counts to GloVe vectors."""

from lmengine.embeddings.cooccurrence import Cooccurrence
from lmengine.embeddings.glove import GloVe
from lmengine.embeddings.vectors import Vectors
from lmengine.embeddings.vocabulary import Vocabulary, tokenise

__all__ = ["Cooccurrence", "GloVe", "Vectors", "Vocabulary", "tokenise"]
