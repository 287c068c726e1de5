"""The words of a text, counted and numbered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmengine import _corpus
from lmengine.checks import check_integer, shown
from lmengine.files import PathLike, text_files, written_aside

MAX_ENTRIES = 20_000_000  # distinct tokens held while counting, some 100 bytes each


def tokenise(text: str) -> list[str]:
    """Split text into tokens: words and numbers in lower case, and each punctuation mark and Han character by itself.

    An apostrophe inside a word and a point or comma inside a number belong to it: "don't", "3.14", "1,000".
    """
    _check_text("text", text)
    return _corpus.tokenise(text)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text, got half a surrogate pair at character {error.start}") from error


def _check_choice(name: str, value: object, *choices: str) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices[:-1]))
        raise ValueError(f"{name}: expected {listed} or {choices[-1]!r}, got {shown(value)}")


def _iterable(name: str, items: Iterable[Any], what: str) -> Iterator[Any]:
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        got = "one string" if isinstance(items, str) else shown(items)
        raise TypeError(f"{name}: expected an iterable of {what}, got {got}")
    return iter(items)


class Vocabulary:
    """Tokens numbered by falling frequency.

    Attributes:
        tokens: list of str; a token's number is its place.
        counts: how often each occurred, list of int.
    """

    def __init__(self, tokens: Sequence[str], counts: Sequence[int] | None = None) -> None:
        self.tokens = list(_iterable("tokens", tokens, "strings"))
        for number, token in enumerate(self.tokens):
            _check_text(f"tokens[{number}]", token)
        given = [0] * len(self.tokens) if counts is None else list(_iterable("counts", counts, "whole numbers"))
        for number, count in enumerate(given):
            check_integer(f"counts[{number}]", count, 0)
        self.counts = [int(count) for count in given]
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
        counter = cls._counter(min_count, max_size, max_entries)
        for number, text in enumerate(_iterable("texts", texts, "strings")):
            _check_text(f"texts[{number}]", text)
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
        _check_choice("errors", errors, "strict", "replace")
        counter = cls._counter(min_count, max_size, max_entries)
        for path in text_files(paths):
            counter.add_file(path, errors)
        return cls._from_counter(counter, min_count, max_size)

    @staticmethod
    def _counter(min_count: int, max_size: int | None, max_entries: int) -> _corpus.Counter:
        check_integer("min_count", min_count, 1)
        if max_size is not None:
            check_integer("max_size", max_size, 1)
        check_integer("max_entries", max_entries, 1)
        return _corpus.Counter(max_entries)

    @classmethod
    def _from_counter(cls, counter: _corpus.Counter, min_count: int, max_size: int | None) -> Vocabulary:
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
        _check_choice("breaks", breaks, "line", "paragraph", "file")
        pieces: list[np.ndarray] = []
        for number, text in enumerate([texts] if isinstance(texts, str) else _iterable("texts", texts, "strings")):
            _check_text(f"texts[{number}]", text)
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
            TypeError, ValueError, OSError: at once, for bad arguments and missing files.
            ValueError: while it is read, for a file that is not UTF-8; the message names the file and the byte.
        """
        _check_choice("breaks", breaks, "line", "paragraph", "file")
        _check_choice("errors", errors, "strict", "replace")
        check_integer("max_tokens", max_tokens, 1)
        return map(torch.from_numpy, _corpus.EncodedFiles(self._encoder, text_files(paths), breaks, errors, max_tokens))

    def decode(self, numbers: Iterable[int] | Tensor) -> list[str]:
        """The tokens of numbers; breaks are left out.

        Raises:
            TypeError: `numbers` are not whole numbers. ValueError: one is not below the vocabulary's size.
        """
        listed = numbers.flatten().tolist() if isinstance(numbers, Tensor) else _iterable("numbers", numbers, "numbers")
        listed = list(listed)
        for place, number in enumerate(listed):
            check_integer(f"numbers[{place}]", number, -(2**63), len(self) - 1)
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
            if not isinstance(content["tokens"], list) or not isinstance(content["counts"], list):
                raise ValueError("expected a list of tokens and a list of counts")
            return cls(content["tokens"], content["counts"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a vocabulary: {error}") from error
