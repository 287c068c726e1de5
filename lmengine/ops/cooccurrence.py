"""GloVe's co-occurrence counts (Pennington et al. 2014): how often two words stand near each other.

Dimensions: tokens = length of the text, entries = distinct (row, column) pairs that occur.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmengine import backends
from lmengine.backends import Operator
from lmengine.checks import check_bool, check_integer, shown

MAX_WINDOW = 32767


def cooccurrence(
    tokens: Tensor,
    vocabulary_size: int,
    window_size: int = 10,
    symmetric: bool = True,
    distance_weighting: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, for every word, the words within `window_size` tokens of it.

    A pair of tokens at distance d adds 1/d (1 without `distance_weighting`) to the entry whose row is the later
    token and whose column is the earlier one; if `symmetric`, to the mirrored entry as well. Weights are summed as
    integer multiples of one unit, so the counts do not depend on the number of threads or on the backend, and are
    exact up to the rounding to float32 for windows up to 22.

    Args:
        tokens: (tokens,) int32 or int64, in [0, vocabulary_size); a negative token is a break between texts, which
            no window crosses.
        vocabulary_size: number of words, up to 2^31 - 1.
        window_size: the farthest distance that counts, 1 to 32767.
        symmetric: count both sides of a word, not only what stands before it.
        distance_weighting: weigh a pair by one over its distance.

    Returns:
        rows (entries,) int32, columns (entries,) int32, values (entries,) float32, sorted by row, then column.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
        RuntimeError: a token is not below vocabulary_size; the message names it and its position.

    Source: Pennington, Socher, Manning, "GloVe: Global Vectors for Word Representation", EMNLP 2014, section 4.2.
    """
    return _operator(tokens, vocabulary_size, window_size, symmetric, distance_weighting)


cooccurrence.operator_name = "cooccurrence"  # type: ignore[attr-defined]


def distance_units(window_size: int, distance_weighting: bool) -> tuple[list[int], int]:
    """The weights of the distances 1 to window_size as whole numbers, and the unit that they are multiples of.

    The unit is 1/lcm(1..window), which makes every weight whole, as long as that is not below 2^-32."""
    if not distance_weighting:
        return [1] * window_size, 1
    scale = 1
    for distance in range(1, window_size + 1):
        scale = math.lcm(scale, distance)
        if scale > 2**32:
            scale = 2**32
            break
    return [(2 * scale + distance) // (2 * distance) for distance in range(1, window_size + 1)], scale


def _check(
    tokens: Tensor,
    vocabulary_size: int,
    window_size: int = 10,
    symmetric: bool = True,
    distance_weighting: bool = True,
) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a tensor, got {shown(tokens)}")
    if tokens.dim() != 1:
        raise ValueError(f"tokens: expected shape (tokens,), got {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tokens: expected dtype int32 or int64, got {tokens.dtype}")
    check_integer("vocabulary_size", vocabulary_size, 1, 2**31 - 1)
    check_integer("window_size", window_size, 1, MAX_WINDOW)
    check_bool("symmetric", symmetric)
    check_bool("distance_weighting", distance_weighting)


_operator = Operator("cooccurrence", _check)


# ---- reference -------------------------------------------------------------------------------------------------


def _reference(
    tokens: Tensor,
    vocabulary_size: int,
    window_size: int = 10,
    symmetric: bool = True,
    distance_weighting: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = tokens.long()
    wrong = (tokens >= vocabulary_size).nonzero()
    if len(wrong):
        position = int(wrong[0])
        raise RuntimeError(bad_token(int(tokens[position]), position, vocabulary_size))
    text = (tokens < 0).cumsum(0)  # which text a token belongs to
    keys, weights = [tokens.new_empty(0)], [tokens.new_empty(0)]
    units, scale = distance_units(window_size, distance_weighting)
    for distance, unit in enumerate(units[: len(tokens)], start=1):
        later, earlier = tokens[distance:], tokens[:-distance]
        near = (text[distance:] == text[:-distance]) & (later >= 0) & (earlier >= 0)
        later, earlier = later[near], earlier[near]
        keys.append(later * vocabulary_size + earlier)
        if symmetric:
            keys.append(earlier * vocabulary_size + later)
        weights.append(torch.full((len(later) * (1 + symmetric),), unit, device=tokens.device))
    distinct, which = torch.unique(torch.cat(keys), return_inverse=True)
    sums = torch.zeros_like(distinct).index_add_(0, which, torch.cat(weights))
    rows, columns = distinct // vocabulary_size, distinct % vocabulary_size
    return rows.int(), columns.int(), (sums.double() / scale).float()


def bad_token(token: int, position: int, vocabulary_size: int) -> str:
    return f"tokens: expected tokens below vocabulary_size = {vocabulary_size}, got {token} at position {position}"


_operator.register("reference", _reference, lambda *args, **kwargs: None)


# ---- C++ and CUDA C++ ------------------------------------------------------------------------------------------


def _compiled(
    tokens: Tensor,
    vocabulary_size: int,
    window_size: int = 10,
    symmetric: bool = True,
    distance_weighting: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.lmengine.cooccurrence(_narrow(tokens), vocabulary_size, window_size, symmetric, distance_weighting)


def _narrow(tokens: Tensor) -> Tensor:
    """Contiguous int32; int64 tokens outside of that range stay what they are: a break, or too large."""
    return (tokens if tokens.dtype == torch.int32 else tokens.clamp(-1, 2**31 - 1).int()).contiguous()


def _fake(
    tokens: Tensor, vocabulary_size: int, window_size: int, symmetric: bool, distance_weighting: bool
) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    index = tokens.new_empty(entries, dtype=torch.int32)
    return index, torch.empty_like(index), tokens.new_empty(entries, dtype=torch.float32)


if backends.library() is not None:
    torch.library.register_fake("lmengine::cooccurrence", _fake)
    _operator.register("cpu", _compiled, lambda *args, **kwargs: None)
    _operator.register("cuda", _compiled, lambda *args, **kwargs: None)


# ---- Triton ----------------------------------------------------------------------------------------------------


def _triton(
    tokens: Tensor,
    vocabulary_size: int,
    window_size: int = 10,
    symmetric: bool = True,
    distance_weighting: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.lmengine.cooccurrence_triton(
        _narrow(tokens), vocabulary_size, window_size, symmetric, distance_weighting
    )


def _triton_unsupported(tokens: Tensor, vocabulary_size: int, *args: object, **kwargs: object) -> str | None:
    from lmengine.kernels.cooccurrence import MAX_VOCABULARY

    if vocabulary_size > MAX_VOCABULARY:
        return f"vocabulary_size: expected at most {MAX_VOCABULARY}, got {vocabulary_size}"
    return None


@torch.library.custom_op("lmengine::cooccurrence_triton", mutates_args=())
def _triton_operator(
    tokens: Tensor, vocabulary_size: int, window_size: int, symmetric: bool, distance_weighting: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from lmengine.kernels import cooccurrence as kernels

    wrong = (tokens >= vocabulary_size).nonzero()
    if len(wrong):
        position = int(wrong[0])
        raise RuntimeError(bad_token(int(tokens[position]), position, vocabulary_size))
    units, scale = distance_units(window_size, distance_weighting)
    return kernels.cooccurrence(tokens, vocabulary_size, units, scale, symmetric)


_triton_operator.register_fake(_fake)
_operator.register("triton", _triton, _triton_unsupported)
