"""Text as numbers of words, for language models with word embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmengine import _corpus
from lmengine.files import PathLike, written_aside

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
SPECIAL = (PAD, UNKNOWN, END)
NO_BLANK_BEFORE = set(".,;:!?)]}%…。，、；：！？）】》”’'_")
NO_BLANK_AFTER = set("([{$#@（【《“‘'_")


class WordTokenizer:
    """Words, numbers, punctuation marks and Han characters as tokens, in lower case; see `lmengine.embeddings.tokenise`.

    Token 0 fills up short texts, 1 stands for every word that is not in the vocabulary, 2 ends a text; the words
    follow from 3 on.

    Attributes:
        words: the vocabulary, in the order of the tokens from 3 on.
    """

    pad, unknown, end = range(len(SPECIAL))

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._tokens = [*SPECIAL, *self.words]
        self._encoder = _corpus.Encoder(self._tokens, self.unknown)  # ValueError for a word that stands twice

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"WordTokenizer({len(self.words)} words)"

    def encode(self, text: str) -> Tensor:
        """(tokens,) int64."""
        return torch.from_numpy(self._encoder.encode_text(text, "file").astype(np.int64))

    def encode_stream(self, texts: Iterable[str]) -> Tensor:
        """All texts one after another, each with the end token behind it: (tokens,) int64."""
        end = torch.tensor([self.end])
        pieces = [piece for text in texts for piece in (self.encode(text), end)]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """Readable text: see `join`."""
        return self.join(map(self.word, tokens.tolist() if isinstance(tokens, Tensor) else tokens))

    def word(self, token: int) -> str:
        """The word of a token, or a special token's name in angle brackets."""
        return self._tokens[token]

    @staticmethod
    def split(text: str) -> list[str]:
        """The words of a text, known or not."""
        return _corpus.tokenise(text)

    @staticmethod
    def join(words: Iterable[str]) -> str:
        """Text of words: blanks stand where English has them, and none between Han characters; an end token becomes a
        line end, padding nothing."""
        text = ""
        previous = ""
        for word in words:
            if word in (PAD, END):
                text, previous = text.rstrip() + ("\n" if word == END else ""), ""
                continue
            apart = previous and word not in NO_BLANK_BEFORE and previous not in NO_BLANK_AFTER
            apart = apart and not (word == previous and not word.isalnum())  # ">>>", "=="
            if apart and not (_is_han(word[0]) and _is_han(previous[-1])):
                text += " "
            text += word
            previous = word
        return text

    def save(self, path: PathLike) -> None:
        """Write the words as JSON."""
        with written_aside(path) as aside:
            aside.write_text(json.dumps({"words": self.words}, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: PathLike) -> WordTokenizer:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else; the message names it.
        """
        try:
            words = json.loads(Path(path).read_text(encoding="utf-8"))["words"]
            return cls(words)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of WordTokenizer: {error!r}") from error


def _is_han(character: str) -> bool:
    return "\u2e80" <= character <= "\u9fff" or character >= "\U00020000" or "\uff00" <= character <= "\uffef"
