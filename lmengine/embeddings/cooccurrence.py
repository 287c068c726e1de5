"""A matrix of co-occurrence counts, counted from numbered text, kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lmengine.files import PathLike, written_aside
from lmengine.ops.cooccurrence import cooccurrence


class Cooccurrence:
    """Counts of the pairs of words that occur near each other; see `lmengine.ops.cooccurrence.cooccurrence`.

    Attributes:
        rows, columns: (entries,) int32; values: (entries,) float32; sorted by row, then column.
        vocabulary_size: number of words.
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, vocabulary_size: int) -> None:
        for name, tensor, dtype in (
            ("rows", rows, torch.int32),
            ("columns", columns, torch.int32),
            ("values", values, torch.float32),
        ):
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
            if tensor.shape != (rows.numel(),):
                raise ValueError(f"{name}: expected shape (entries,) = ({rows.numel()},), got {tuple(tensor.shape)}")
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
    ) -> Cooccurrence:
        """Count numbered text.

        Args:
            tokens: (tokens,) int32 or int64, a negative token at breaks; or a stream of such pieces of one text, as
                from `Vocabulary.encode_files`, which need not end at breaks: the part of a piece after its last
                break is counted with the next.
            vocabulary_size, window_size, symmetric, distance_weighting: see `lmengine.ops.cooccurrence`.
        """
        total: tuple[Tensor, Tensor, Tensor] | None = None
        for piece in whole_texts([tokens] if isinstance(tokens, Tensor) else tokens):
            counted = cooccurrence(piece, vocabulary_size, window_size, symmetric, distance_weighting)
            total = counted if total is None else _add(total, counted, vocabulary_size)
        if total is None:
            total = cooccurrence(torch.empty(0, dtype=torch.int32), vocabulary_size, window_size)
        rows, columns, values = total
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
    """The same tokens, cut at breaks only: what follows a piece's last break goes to the next piece."""
    rest: list[Tensor] = []
    for piece in pieces:
        breaks = (piece < 0).nonzero()
        if len(breaks) == 0:
            rest.append(piece)
            continue
        cut = int(breaks[-1])
        yield torch.cat([*rest, piece[:cut]])
        rest = [piece[cut + 1 :]]
    if rest:
        yield torch.cat(rest)


def _add(
    one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor], vocabulary_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of two sets of counts, in float64."""
    keys = torch.cat([rows.long() * vocabulary_size + columns for rows, columns, _ in (one, other)])
    values = torch.cat([one[2].double(), other[2].double()])
    distinct, which = torch.unique(keys, return_inverse=True)
    sums = values.new_zeros(len(distinct)).index_add_(0, which, values)
    return (distinct // vocabulary_size).int(), (distinct % vocabulary_size).int(), sums
