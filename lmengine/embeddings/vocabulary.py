"""The words of a text, counted and numbered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lmengine import _corpus
from lmengine.files import PathLike, text_files, written_aside

MAX_ENTRIES = 20_000_000  # distinct tokens held while counting, some 100 bytes each


def tokenise(text: str) -> list[str]:
    """Split text into tokens: words and numbers in lower case, and each punctuation mark and Han character by itself.

    An apostrophe inside a word and a point or comma inside a number belong to it: "don't", "3.14", "1,000".
    """
    return _corpus.tokenise(text)


class Vocabulary:
    """Tokens numbered by falling frequency.

    Attributes:
        tokens: list of str; a token's number is its place.
        counts: how often each occurred, list of int.
    """

    def __init__(self, tokens: Sequence[str], counts: Sequence[int] | None = None) -> None:
        self.tokens = list(tokens)
        self.counts = [0] * len(self.tokens) if counts is None else [int(count) for count in counts]
        if len(self.counts) != len(self.tokens):
            raise ValueError(f"counts: expected {len(self.tokens)}, one a token, got {len(self.counts)}")
        self.token_to_id = {token: number for number, token in enumerate(self.tokens)}
        self._encoder = _corpus.Encoder(self.tokens, None)  # raises ValueError for a token that stands twice

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], min_count: int = 1, max_size: int | None = None, max_entries: int = MAX_ENTRIES
    ) -> Vocabulary:
        """Count the tokens of texts.

        Args:
            texts: strings, such as documents or lines.
            min_count: leave out tokens that occur less often.
            max_size: keep the so many most frequent.
            max_entries: bound on the distinct tokens held at once; when more come, the rarest are forgotten.

        Raises:
            ValueError: min_count or max_size is below 1, or min_count is too low for what max_entries made it forget.
        """
        if isinstance(texts, str):
            raise TypeError("texts: expected an iterable of strings, got one string")
        counter = _corpus.Counter(max_entries)
        for text in texts:
            counter.add_text(text)
        return cls._from_counter(counter, min_count, max_size)

    @classmethod
    def from_files(
        cls,
        paths: PathLike | Iterable[PathLike],
        min_count: int = 1,
        max_size: int | None = None,
        errors: str = "strict",
        max_entries: int = MAX_ENTRIES,
    ) -> Vocabulary:
        """Count the tokens of UTF-8 files, read as a stream.

        Args:
            paths: a file, a folder (all files in it and below), or several of these.
            min_count, max_size, max_entries: see `from_texts`.
            errors: "strict", or "replace" to read what is not UTF-8 as U+FFFD.

        Raises:
            ValueError: a file is not UTF-8 (the message names the file and the byte), or as for `from_texts`.
            OSError: a file cannot be read.
        """
        counter = _corpus.Counter(max_entries)
        for path in text_files(paths):
            counter.add_file(path, errors)
        return cls._from_counter(counter, min_count, max_size)

    @classmethod
    def _from_counter(cls, counter: _corpus.Counter, min_count: int, max_size: int | None) -> Vocabulary:
        if min_count < 1:
            raise ValueError(f"min_count: expected at least 1, got {min_count}")
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size: expected at least 1 or None, got {max_size}")
        if counter.lost >= min_count:
            raise ValueError(
                f"min_count: with max_entries this small, up to {counter.lost} occurrences of a token "
                f"may be missing, so min_count must be above that, got {min_count}"
            )
        common = counter.most_common(min_count, 2**31 - 1 if max_size is None else max_size)
        return cls([token for token, _ in common], [count for _, count in common])

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self.token_to_id

    def __getitem__(self, token: str) -> int:
        """The number of a token; KeyError where it is not in the vocabulary."""
        return self.token_to_id[token]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.tokens, self.counts) == (other.tokens, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens: {', '.join(self.tokens[:5])}{', …' if len(self) > 5 else ''})"

    def encode(self, texts: str | Iterable[str], breaks: str = "paragraph") -> Tensor:
        """Numbers of the tokens of one text or several; tokens outside of the vocabulary are left out.

        Args:
            texts: a string, or several.
            breaks: where windows may not cross besides the end of a text: after every "line", after every
                "paragraph" (at an empty line), or only at the end of the text ("file").

        Returns:
            (tokens,) int32; −1 stands at breaks.
        """
        pieces: list[np.ndarray] = []
        for text in [texts] if isinstance(texts, str) else texts:
            numbers = self._encoder.encode_text(text, breaks)
            if len(numbers):
                pieces += [np.array([-1], np.int32), numbers]
        return torch.from_numpy(np.concatenate(pieces[1:])) if pieces else torch.empty(0, dtype=torch.int32)

    def encode_files(
        self,
        paths: PathLike | Iterable[PathLike],
        breaks: str = "paragraph",
        errors: str = "strict",
        max_tokens: int = 16_000_000,
    ) -> Iterator[Tensor]:
        """Encode files as a stream: tensors like `encode` returns, of about max_tokens each.

        Raises:
            ValueError: a file is not UTF-8; the message names the file and the byte.
        """
        for numbers in _corpus.EncodedFiles(self._encoder, text_files(paths), breaks, errors, max_tokens):
            yield torch.from_numpy(numbers)

    def decode(self, numbers: Iterable[int] | Tensor) -> list[str]:
        """The tokens of numbers; breaks are left out."""
        listed = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        return [self.tokens[number] for number in listed if number >= 0]

    def save(self, path: PathLike) -> None:
        """Write the vocabulary as JSON."""
        with written_aside(path) as aside:
            aside.write_text(json.dumps({"tokens": self.tokens, "counts": self.counts}, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, path: PathLike) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not a vocabulary; the message names the file and what is wrong.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: not a vocabulary in JSON: {error}") from error
        if not isinstance(content, dict) or not {"tokens", "counts"} <= content.keys():
            raise ValueError(f"{path}: not a vocabulary: expected an object with the keys tokens and counts")
        try:
            return cls(content["tokens"], content["counts"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a vocabulary: {error}") from error
