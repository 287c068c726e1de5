"""A matrix of co-occurrence counts, counted from numbered text, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lmengine import _corpus
from lmengine.checks import check_callable, check_integer, shown
from lmengine.files import PathLike, written_aside
from lmengine.ops.cooccurrence import cooccurrence
from lmengine.ops.embedding import check_counts, check_range

PIECE_TOKENS = 4_000_000  # a longer text in memory is counted in pieces of at least so many
MAX_PIECES = 16  # so that adding the pieces' counts stays a small part of the counting

Counts = tuple[Tensor, Tensor, Tensor]  # rows, columns, values


class Cooccurrence:
    """Counts of the pairs of words that occur near each other; see `lmengine.ops.cooccurrence.cooccurrence`.

    Attributes:
        rows, columns: (entries,) int32; values: (entries,) float32; sorted by row, then column.
        vocabulary_size: number of words.
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, vocabulary_size: int) -> None:
        check_integer("vocabulary_size", vocabulary_size, 1, 2**31 - 1)
        for name, tensor, dtype in (
            ("rows", rows, torch.int32),
            ("columns", columns, torch.int32),
            ("values", values, torch.float32),
        ):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {shown(tensor)}")
            if tensor.device != rows.device:
                raise ValueError(f"{name}: expected a tensor on the rows' {rows.device}, got {tensor.device}")
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
            if tensor.shape != (rows.numel(),):
                raise ValueError(f"{name}: expected shape (entries,) = ({rows.numel()},), got {tuple(tensor.shape)}")
        check_range("rows", rows, vocabulary_size)
        check_range("columns", columns, vocabulary_size)
        check_counts(values)
        self.rows, self.columns, self.values = rows, columns, values
        self.vocabulary_size = vocabulary_size

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor | Iterable[Tensor],
        vocabulary_size: int,
        window_size: int = 10,
        symmetric: bool = True,
        distance_weighting: bool = True,
        callback: Callable[[int], Any] | None = None,
    ) -> Cooccurrence:
        """Count numbered text.

        Args:
            tokens: (tokens,) int32 or int64, a negative token at breaks; or a stream of such pieces of one text, as
                from `Vocabulary.encode_files`, which need not end at breaks: the part of a piece after its last
                break is counted with the next.
            vocabulary_size, window_size, symmetric, distance_weighting: see `lmengine.ops.cooccurrence`.
            callback: called after every piece with the number of tokens counted so far, breaks among them.

        A tensor of more than 4 million tokens on the CPU is cut into pieces at breaks (at most 16). The counts of a
        piece are rounded to float32 and added in float64, so that counts of several pieces may differ from those of
        the whole in the last bit.
        """
        check_callable("callback", callback)
        sums: list[Counts] = []  # of neighbouring pieces, each at least twice as long as the next
        done = 0
        for piece in whole_texts(_cut(tokens) if isinstance(tokens, Tensor) else tokens):
            sums.append(cooccurrence(piece, vocabulary_size, window_size, symmetric, distance_weighting))
            while len(sums) > 1 and len(sums[-2][0]) < 2 * len(sums[-1][0]):
                sums[-2:] = [_add(sums[-2], sums[-1], vocabulary_size)]
            done += len(piece)
            if callback is not None:
                callback(done)
        while len(sums) > 1:
            sums[-2:] = [_add(sums[-2], sums[-1], vocabulary_size)]
        if not sums:
            sums.append(cooccurrence(torch.empty(0, dtype=torch.int32), vocabulary_size, window_size))
        rows, columns, values = sums[0]
        return cls(rows, columns, values.float(), vocabulary_size)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Cooccurrence({len(self)} entries of {self.vocabulary_size} words)"

    def save(self, path: PathLike) -> None:
        """Write the counts as safetensors."""
        tensors = {name: getattr(self, name).cpu().contiguous() for name in ("rows", "columns", "values")}
        with written_aside(path) as aside:
            safetensors.torch.save_file(tensors, aside, {"vocabulary_size": str(self.vocabulary_size)})

    @classmethod
    def load(cls, path: PathLike) -> Cooccurrence:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is cut short or holds something else; the message names it.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path: expected a string or a pathlib path, got {shown(path)}")
        if os.path.isdir(path):
            raise IsADirectoryError(f"path: expected a file of co-occurrence counts, got the folder {str(path)!r}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = set(file.keys())
                vocabulary_size = int((file.metadata() or {}).get("vocabulary_size", 0))
                if names != {"rows", "columns", "values"} or vocabulary_size < 1:
                    raise ValueError(f"expected rows, columns, values and a vocabulary_size, got {sorted(names)}")
                rows, columns, values = (file.get_tensor(name) for name in ("rows", "columns", "values"))
                return cls(rows, columns, values, vocabulary_size)
        except (safetensors.SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of co-occurrence counts: {error}") from error


def whole_texts(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tokens, cut after breaks only: what follows a piece's last break goes to the next piece."""
    if isinstance(pieces, (str, bytes)) or not isinstance(pieces, Iterable):
        raise TypeError(f"tokens: expected a tensor or an iterable of tensors, got {shown(pieces)}")
    rest: list[Tensor] = []
    for piece in pieces:
        if not isinstance(piece, Tensor) or piece.dtype not in (torch.int32, torch.int64) or piece.dim() != 1:
            raise TypeError(f"tokens: expected tensors of shape (tokens,) and int32 or int64, got {shown(piece)}")
        breaks = (piece < 0).nonzero()
        if len(breaks) == 0:
            rest.append(piece)
            continue
        end = int(breaks[-1]) + 1
        yield torch.cat([*rest, piece[:end]])
        rest = [piece[end:]] if end < len(piece) else []
    if rest:
        yield torch.cat(rest)


def _cut(tokens: Tensor) -> Iterable[Tensor]:
    if tokens.device.type != "cpu" or tokens.dim() != 1:
        return [tokens]
    return tokens.split(max(PIECE_TOKENS, -(-len(tokens) // MAX_PIECES)))


def _add(one: Counts, other: Counts, vocabulary_size: int) -> Counts:
    """The sum of two sets of counts, in float64."""
    if one[0].device.type == "cpu":
        first, second = (
            (rows.numpy(), columns.numpy(), values.double().numpy()) for rows, columns, values in (one, other)
        )
        rows, columns, values = map(torch.from_numpy, _corpus.add_counts(first, second, torch.get_num_threads()))
        return rows, columns, values
    keys = torch.cat([rows.long() * vocabulary_size + columns for rows, columns, _ in (one, other)])
    values = torch.cat([one[2].double(), other[2].double()])
    distinct, which = torch.unique(keys, return_inverse=True)
    sums = values.new_zeros(len(distinct)).index_add_(0, which, values)
    return (distinct // vocabulary_size).int(), (distinct % vocabulary_size).int(), sums
