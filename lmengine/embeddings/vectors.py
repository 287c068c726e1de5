"""Word vectors with their words: nearest words, and word2vec's text format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lmengine.checks import check_integer, shown
from lmengine.files import PathLike, written_aside


class Vectors:
    """Words and their vectors.

    Attributes:
        words: list of str.
        array: (words, dim) float32.
    """

    def __init__(self, words: Sequence[str], array: Tensor | np.ndarray) -> None:
        if isinstance(words, (str, bytes)) or not isinstance(words, Iterable):
            raise TypeError(f"words: expected a sequence of strings, got {shown(words)}")
        self.words = list(words)
        for number, word in enumerate(self.words):
            if not isinstance(word, str):
                raise TypeError(f"words[{number}]: expected a string, got {shown(word)}")
        if not isinstance(array, (Tensor, np.ndarray)) or (
            isinstance(array, np.ndarray) and array.dtype.kind not in "fiu"
        ):
            raise TypeError(f"array: expected a tensor or a NumPy array of numbers, got {shown(array)}")
        self.array = torch.as_tensor(array, dtype=torch.float32).detach().cpu()
        if self.array.dim() != 2 or len(self.array) != len(self.words):
            raise ValueError(f"array: expected shape ({len(self.words)} words, dim), got {tuple(self.array.shape)}")
        finite = self.array.isfinite().all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"array: expected finite numbers, got others in row {row}, of {self.words[row]!r}")
        self.word_to_row = {word: row for row, word in enumerate(self.words)}
        norms = self.array.norm(dim=1, keepdim=True)
        self._directions = self.array / norms.clamp(min=torch.finfo(torch.float32).tiny)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.word_to_row

    def __getitem__(self, word: str) -> Tensor:
        """The vector of a word: (dim,)."""
        return self.array[self._row(word)]

    def __repr__(self) -> str:
        return f"Vectors({len(self)} words, dim {self.array.shape[1]})"

    def _row(self, word: str) -> int:
        if word not in self.word_to_row:
            raise KeyError(f"word: {word!r} has no vector")
        return self.word_to_row[word]

    def similarity(self, one: str, other: str) -> float:
        """The cosine between two words' vectors. Raises KeyError for a word without a vector."""
        return float(self._directions[self._row(one)] @ self._directions[self._row(other)])

    def nearest(self, word: str | Tensor, k: int = 10) -> list[tuple[str, float]]:
        """The k words whose vectors point most nearly where the word's (or a given vector) does, with the cosines.

        The word itself is left out.

        Raises:
            KeyError: a word without a vector. TypeError, ValueError: a vector of another size or of zeros; k below 0.
        """
        check_integer("k", k, 0)
        if isinstance(word, str):
            row = self._row(word)
            cosines = self._directions @ self._directions[row]
            cosines[row] = -torch.inf
            available = len(self) - 1
        else:
            if not isinstance(word, Tensor):
                raise TypeError(f"word: expected a string or a tensor, got {shown(word)}")
            direction = word.float().cpu()
            if direction.shape != self.array.shape[1:]:
                raise ValueError(f"word: expected shape ({self.array.shape[1]},), got {tuple(direction.shape)}")
            if not 0 < direction.norm() < torch.inf:
                raise ValueError("word: expected a vector that points somewhere, got one of zeros or not finite")
            cosines = self._directions @ (direction / direction.norm())
            available = len(self)
        best = cosines.topk(max(0, min(k, available)))
        return [(self.words[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def save(self, path: PathLike, header: bool = True) -> None:
        """Write word2vec's text format: a line "words dim", then a line "word number number …" a word.

        Without `header`, the first line is left out, as in the files of the GloVe project.

        Raises:
            ValueError: a word holds white space, which the format cannot express.
        """
        for word in self.words:
            if not word or any(character.isspace() for character in word):
                raise ValueError(f"words: the text format cannot hold {word!r}: a word with white space, or empty")
        with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
            if header:
                file.write(f"{len(self.words)} {self.array.shape[1]}\n")
            for word, row in zip(self.words, self.array.numpy(), strict=True):
                file.write(f"{word} {' '.join(map(str, row))}\n")

    @classmethod
    def load(cls, path: PathLike) -> Vectors:
        """Read word2vec's text format, with or without the header line.

        Raises:
            ValueError: a line is not what the format asks for; the message names the file, the line and the reason.
        """
        words: list[str] = []
        rows: list[np.ndarray] = []
        promised: int | None = None
        dim: int | None = None
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    parts = line.decode("utf-8").rstrip("\r\n").rstrip(" ").split(" ")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}: line {number}: not UTF-8 ({error})") from error
                if number == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
                    promised, dim = int(parts[0]), int(parts[1])
                    continue
                if dim is None:
                    dim = len(parts) - 1
                if len(parts) != dim + 1 or dim < 1:
                    raise ValueError(
                        f"{path}: line {number}: expected a word and {max(dim, 1)} numbers, got {len(parts)} parts"
                    )
                try:
                    rows.append(np.array(parts[1:], dtype=np.float32))
                except ValueError as error:
                    raise ValueError(f"{path}: line {number}: {error}") from error
                words.append(parts[0])
        if promised is not None and promised != len(words):
            raise ValueError(f"{path}: line 1 promises {promised} words, but {len(words)} follow")
        try:
            return cls(words, np.stack(rows) if rows else np.empty((0, dim or 0), np.float32))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
