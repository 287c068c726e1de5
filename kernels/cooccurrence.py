"""Co-occurrence counts in Triton: write a key for every pair in every window, sort the keys, sum equal ones.

A key is (row · vocabulary + column) · 2^DISTANCE_BITS + (distance − 1), so that sorted keys carry their own weights.
Sums are whole numbers, so the result does not depend on the order in which programs add to them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lmengine.kernels.configuration import StaticConfiguration
from torch import Tensor

BLOCK = 512
DISTANCE_BITS = 15
NO_PAIR = 2**63 - 1
MAX_VOCABULARY = 2**24 - 1  # so that keys stay below NO_PAIR
MAX_KEYS = 2**28  # sorted at once; longer texts are counted in parts


@triton.jit
def pairs_kernel(
    tokens,  # (length) int32
    keys,  # (window, sides, positions) int64
    first,  # the first position that this launch counts
    positions,
    vocabulary_size,
    window_size,
    SYMMETRIC: tl.constexpr,
    DISTANCE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = local < positions
    position = first + local
    token = tl.load(tokens + position, mask=inside, other=-1).to(tl.int64)
    alive = inside & (token >= 0)
    for distance in range(1, window_size + 1):
        before = tl.load(tokens + position - distance, mask=alive & (position >= distance), other=-1).to(tl.int64)
        alive = alive & (before >= 0)
        key = ((token * vocabulary_size + before) << DISTANCE_BITS) + distance - 1
        tl.store(keys + local, tl.where(alive, key, 0x7FFFFFFFFFFFFFFF), mask=inside)
        keys += positions
        if SYMMETRIC:
            key = ((before * vocabulary_size + token) << DISTANCE_BITS) + distance - 1
            tl.store(keys + local, tl.where(alive, key, 0x7FFFFFFFFFFFFFFF), mask=inside)
            keys += positions


@triton.jit
def sum_kernel(
    keys,  # (pairs) int64, sorted
    entries,  # (pairs) int32: number of the entry that a pair adds to
    units,  # (window) int64: weights of the distances
    entry_keys,  # (entries) int64, written
    sums,  # (entries) int64, added to
    pairs,
    DISTANCE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # In a block the running sum is taken once; each entry adds its value where the entry ends and takes it off
    # where it begins, so that there are two atomic additions an entry and block.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < pairs
    last_of_block = tl.minimum(tl.program_id(0).to(tl.int64) * BLOCK + BLOCK, pairs) - 1
    key = tl.load(keys + index, mask=inside, other=0)
    entry = tl.load(entries + index, mask=inside, other=0)
    previous = tl.load(entries + index - 1, mask=inside & (index > 0), other=-1)
    following = tl.load(entries + index + 1, mask=inside & (index < last_of_block), other=-1)
    unit = tl.load(units + (key & ((1 << DISTANCE_BITS) - 1)), mask=inside, other=0)
    running = tl.cumsum(unit, axis=0)
    begins = inside & ((entry != previous) | (index == tl.program_id(0).to(tl.int64) * BLOCK))
    tl.atomic_add(sums + entry, running, mask=inside & (entry != following), sem="relaxed")
    tl.atomic_add(sums + entry, unit - running, mask=begins, sem="relaxed")
    tl.store(entry_keys + entry, key >> DISTANCE_BITS, mask=inside & (entry != previous))


def cooccurrence(
    tokens: Tensor, vocabulary_size: int, units: list[int], scale: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values; see lmengine/ops/cooccurrence.py, which checks the arguments and gives the units.

    Args:
        tokens: (length,) int32, contiguous, below vocabulary_size.
        units, scale: the weight of distance d is units[d - 1] / scale.
    """
    weights = torch.tensor(units, dtype=torch.int64, device=tokens.device)
    step = max(1, MAX_KEYS // (len(units) * (1 + symmetric)))
    parts = [
        _count(tokens, first, min(step, len(tokens) - first), vocabulary_size, weights, symmetric)
        for first in range(0, len(tokens), step)
    ]
    if not parts:
        keys = sums = torch.empty(0, dtype=torch.int64, device=tokens.device)
    elif len(parts) == 1:
        keys, sums = parts[0]
    else:
        keys, entry = torch.unique(torch.cat([part[0] for part in parts]), return_inverse=True)
        sums = torch.zeros_like(keys).index_add_(0, entry, torch.cat([part[1] for part in parts]))
    rows = keys // vocabulary_size
    return rows.int(), (keys - rows * vocabulary_size).int(), (sums.double() / scale).float()


def _count(
    tokens: Tensor, first: int, positions: int, vocabulary_size: int, units: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Keys (row · vocabulary + column) and sums of the pairs whose later token is one of `positions` from `first`."""
    window_size = len(units)
    keys = torch.empty(window_size * (1 + symmetric) * positions, dtype=torch.int64, device=tokens.device)
    pairs_kernel[(triton.cdiv(positions, BLOCK),)](
        tokens, keys, first, positions, vocabulary_size, window_size,
        SYMMETRIC=symmetric, DISTANCE_BITS=DISTANCE_BITS, BLOCK=BLOCK,
    )  # fmt: skip
    keys = keys.sort().values
    keys = keys[: int(torch.searchsorted(keys, NO_PAIR))]
    if len(keys) == 0:
        return keys, keys
    different = (keys[1:] >> DISTANCE_BITS) != (keys[:-1] >> DISTANCE_BITS)
    entries = torch.zeros(len(keys), dtype=torch.int32, device=keys.device)
    torch.cumsum(different, 0, dtype=torch.int32, out=entries[1:])
    sums = torch.zeros(int(entries[-1]) + 1, dtype=torch.int64, device=keys.device)
    entry_keys = torch.empty_like(sums)
    sum_kernel[(triton.cdiv(len(keys), BLOCK),)](
        keys, entries, units, entry_keys, sums, len(keys), DISTANCE_BITS=DISTANCE_BITS, BLOCK=BLOCK
    )
    return entry_keys, sums


def static_configurations() -> list[StaticConfiguration]:
    pairs = [
        StaticConfiguration(
            name=f"cooccurrence pairs{' symmetric' if symmetric else ''}",
            kernel=pairs_kernel,
            signature={
                "tokens": "*i32",
                "keys": "*i64",
                "first": "i32",
                "positions": "i32",
                "vocabulary_size": "i32",
                "window_size": "i32",
            },
            constants={"SYMMETRIC": symmetric, "DISTANCE_BITS": DISTANCE_BITS, "BLOCK": BLOCK},
        )
        for symmetric in (True, False)
    ]
    sums = StaticConfiguration(
        name="cooccurrence sum",
        kernel=sum_kernel,
        signature={
            "keys": "*i64",
            "entries": "*i32",
            "units": "*i64",
            "entry_keys": "*i64",
            "sums": "*i64",
            "pairs": "i32",
        },
        constants={"DISTANCE_BITS": DISTANCE_BITS, "BLOCK": BLOCK},
    )
    return [*pairs, sums]
