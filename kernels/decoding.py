"""Decoding in Triton: new keys and values into the cache, the splits of the keys each by a program, and their sum.

B: batch, N: heads, M: heads of keys and values, Q: queries a sequence, D: head_dim, E: the values' head_dim. A program
has BLOCK_M of the Q * N / M queries that share a key head, in rows: query i of head h is row h * Q + i. How the keys are
cut is csrc/attention/decoding.h's arithmetic: it hangs on the sequence's own length, not on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from lmengine.kernels.configuration import StaticConfiguration
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
STEP = tl.constexpr(64)
SMALLEST_SPLIT = tl.constexpr(128)
WANTED_SPLITS = tl.constexpr(512)
BLOCK_M = 16
BLOCK_S = 16  # splits that are combined at a time
# Triton is kept from compiling anew for a number that is 1 or a multiple of 16, so that what is launched is what
# static_configurations() lists.
NUMBERS = (
    "query_batch", "query_head", "query_row", "new_key_batch", "new_key_head", "new_key_row", "new_value_batch",
    "new_value_head", "new_value_row", "key_batch", "key_head", "key_row", "value_batch", "value_head", "value_row",
    "output_batch", "output_head", "output_row", "slopes_batch",
    "heads", "kv_heads", "queries", "capacity", "head_dim", "value_dim", "has_new", "paged", "max_blocks", "blocks",
    "page_size", "has_slopes", "window_left", "num_splits", "most", "tiles", "rotary_dim", "rotary_positions",
    "interleaved",
)  # fmt: skip


@triton.jit
def in_eights(number):
    """A stride that was passed as its eighth, so that the compiler knows it for a multiple of 8; it may pass 2^31."""
    return number.to(tl.int64) * 8


@triton.jit
def length_of(cache_lengths, batch, queries, has_new):
    """The sequence's keys after appending."""
    return tl.maximum(tl.load(cache_lengths + batch), 0) + tl.where(has_new != 0, queries, 0)


@triton.jit
def splits_of(length, queries, capacity, window_left, kv_heads, num_splits):
    """The keys [begin, end) that any query sees, where the first split begins, the splits' size and their number."""
    begin = tl.where(window_left < 0, 0, tl.maximum(length - queries - window_left, 0))
    end = tl.minimum(length, capacity)
    first = begin // STEP * STEP
    keys = end - first
    given = tl.maximum(tl.cdiv(tl.cdiv(keys, tl.maximum(num_splits, 1)), STEP), 1) * STEP
    size = tl.maximum(keys * 0, SMALLEST_SPLIT)
    for _ in range(24):
        more = (size < keys) & (tl.cdiv(keys, size) * kv_heads > WANTED_SPLITS)
        size = tl.where(more, size * 2, size)
    size = tl.where(num_splits > 0, given, size)
    count = tl.where(end > begin, tl.cdiv(keys, size), 0)
    return begin, end, first, size, count


@triton.jit
def places_of(block_table, batch, keys, wanted, max_blocks, blocks, page_size, paged):
    """Which sequence or page of the cache keys lie in, which of its rows, and whether there is such a page."""
    page = keys.to(tl.int64) * 0 + batch
    row = keys
    if paged != 0:
        page = tl.load(block_table + batch * max_blocks + keys // page_size, wanted, other=-1).to(tl.int64)
        row = keys % page_size
        wanted = wanted & (page >= 0) & (page < blocks)
    return page, row.to(tl.int64), wanted


@triton.jit
def tanh(x):
    """A series where the quotient would lose digits; both within 2e-7 of the exact value."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    small = tl.exp(-2 * tl.abs(x))
    quotient = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


# ---- appending and rotating ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def prepare_kernel(
    query, new_key, new_value, key_cache, value_cache, rotated, cache_lengths, block_table, cos, sin,
    query_batch, query_head, query_row, new_key_batch, new_key_head, new_key_row, new_value_batch, new_value_head,
    new_value_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    heads, kv_heads, queries, capacity, head_dim, value_dim, has_new, paged, max_blocks, blocks, page_size,
    rotary_dim, rotary_positions, interleaved, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program a row: the queries to `rotated` (B, N, Q, D), where they rotate, then the new keys and values."""
    query_batch, query_head, query_row = in_eights(query_batch), in_eights(query_head), in_eights(query_row)
    new_key_batch, new_key_head, new_key_row = in_eights(new_key_batch), in_eights(new_key_head), in_eights(new_key_row)
    new_value_batch, new_value_head = in_eights(new_value_batch), in_eights(new_value_head)
    new_value_row = in_eights(new_value_row)
    key_batch, key_head, key_row = in_eights(key_batch), in_eights(key_head), in_eights(key_row)
    value_batch, value_head, value_row = in_eights(value_batch), in_eights(value_head), in_eights(value_row)
    head_dim, value_dim = head_dim * 8, value_dim * 8  # likewise
    rotates = rotary_dim > 0
    slots = tl.where(rotates, heads, 0)
    pid = tl.program_id(0)
    index = pid % queries
    slot = pid // queries % (slots + tl.where(has_new != 0, 2 * kv_heads, 0))
    batch = (pid // queries // (slots + tl.where(has_new != 0, 2 * kv_heads, 0))).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    length = length_of(cache_lengths, batch, queries, has_new)
    position = tl.maximum(length - queries + index, 0)
    is_query = slot < slots
    is_value = slot >= slots + kv_heads
    head = tl.where(is_query, slot, tl.where(is_value, slot - slots - kv_heads, slot - slots)).to(tl.int64)

    half = tl.maximum(rotary_dim // 2, 1)
    turns = (dims < rotary_dim) & (is_value == 0)
    if interleaved != 0:
        partner, angle, negative = dims ^ 1, dims // 2, dims % 2 == 0
    else:
        partner, angle, negative = tl.where(dims < half, dims + half, dims - half), dims % half, dims < half
    known = turns & (position < rotary_positions)
    at = position.to(tl.int64) * half + angle
    c = tl.load(cos + at, known, other=float("nan")).to(tl.float32)
    s = tl.load(sin + at, known, other=float("nan")).to(tl.float32)

    if is_query:
        source = query + batch * query_batch + head * query_head + index.to(tl.int64) * query_row
        within = dims < head_dim
        x = tl.load(source + dims, within, other=0.0)
        y = tl.load(source + partner, turns, other=0.0).to(tl.float32)
        turned = x.to(tl.float32) * c + tl.where(negative, -y, y) * s
        to = rotated + ((batch * heads + head) * queries + index) * head_dim
        tl.store(to + dims, tl.where(turns, turned.to(x.dtype), x), within)
    else:
        row_key = tl.minimum(position, capacity)
        page, row, there = places_of(
            block_table, batch, row_key, row_key < capacity, max_blocks, blocks, page_size, paged
        )
        if is_value:
            source = new_value + batch * new_value_batch + head * new_value_head + index.to(tl.int64) * new_value_row
            within = (dims < value_dim) & there
            x = tl.load(source + dims, within, other=0.0)
            tl.store(value_cache + page * value_batch + head * value_head + row * value_row + dims, x, within)
        else:
            source = new_key + batch * new_key_batch + head * new_key_head + index.to(tl.int64) * new_key_row
            within = (dims < head_dim) & there
            x = tl.load(source + dims, within, other=0.0)
            y = tl.load(source + partner, turns, other=0.0).to(tl.float32)
            turned = x.to(tl.float32) * c + tl.where(negative, -y, y) * s
            x = tl.where(turns, turned.to(x.dtype), x)
            tl.store(key_cache + page * key_batch + head * key_head + row * key_row + dims, x, within)


# ---- the splits ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def split_kernel(
    query, key_cache, value_cache, output, logsumexp, partials, states, cache_lengths, block_table, slopes,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, slopes_batch,
    heads, kv_heads, queries, capacity, head_dim, value_dim, has_new, paged, max_blocks, blocks, page_size,
    has_slopes, window_left, num_splits, most, tiles, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of some rows: output (B, N, Q, E) and logsumexp (B, N, Q) where it is the only one, else the weighted
    sums (B, N, Q, most, E), largest scores and sums of weights (B, N, Q, most, 2)."""
    query_batch, query_head, query_row = in_eights(query_batch), in_eights(query_head), in_eights(query_row)
    key_batch, key_head, key_row = in_eights(key_batch), in_eights(key_head), in_eights(key_row)
    value_batch, value_head, value_row = in_eights(value_batch), in_eights(value_head), in_eights(value_row)
    output_batch, output_head, output_row = in_eights(output_batch), in_eights(output_head), in_eights(output_row)
    head_dim, value_dim = head_dim * 8, value_dim * 8  # likewise
    pid = tl.program_id(0)
    split = pid % most
    tile = pid // most % tiles
    kv_head = (pid // most // tiles % kv_heads).to(tl.int64)
    batch = (pid // most // tiles // kv_heads).to(tl.int64)
    length = length_of(cache_lengths, batch, queries, has_new)
    begin, end, first, size, count = splits_of(length, queries, capacity, window_left, kv_heads, num_splits)
    if (split < count) | (split == 0):
        group = heads // kv_heads
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        head = kv_head * group + rows // queries
        index = rows % queries
        real = rows < group * queries
        position = length - queries + index
        slope = tl.zeros([BLOCK_M], tl.float32)
        if has_slopes != 0:
            slope = tl.load(slopes + batch * slopes_batch + head, real, other=0.0)
        q = tl.load(
            query + batch * query_batch + (head * query_head + index.to(tl.int64) * query_row)[:, None] + dims[None, :],
            real[:, None] & (dims < head_dim)[None, :], other=0.0,
        )  # fmt: skip
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        start = first + split * size
        stop = tl.minimum(start + size, end)
        for block in range(start, stop, BLOCK_N):
            keys = block + tl.arange(0, BLOCK_N)
            page, row, there = places_of(
                block_table, batch, keys, (keys >= begin) & (keys < stop), max_blocks, blocks, page_size, paged
            )
            k = tl.load(
                key_cache + kv_head * key_head + (page * key_batch + row * key_row)[:, None] + dims[None, :],
                there[:, None] & (dims < head_dim)[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if softcap > 0:
                scores = softcap * tanh(scores / softcap)
            distance = position[:, None] - keys[None, :]
            scores -= slope[:, None] * tl.abs(distance).to(tl.float32)
            seen = there[None, :] & (distance >= 0) & ((distance <= window_left) | (window_left < 0))
            scores = tl.where(seen, scores, float("-inf"))
            now = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp2((scores - shift[:, None]) * LOG2_E)
            factor = tl.exp2((largest - shift) * LOG2_E)
            total = total * factor + tl.sum(weights, 1)
            v = tl.load(
                value_cache + kv_head * value_head + (page * value_batch + row * value_row)[:, None] + dims[None, :],
                there[:, None] & (dims < value_dim)[None, :], other=0.0,
            )  # fmt: skip
            sums = tl.dot(weights.to(v.dtype), v, sums * factor[:, None], input_precision="ieee")
            largest = now
        flat = (batch * heads + head) * queries + index
        within = real[:, None] & (dims < value_dim)[None, :]
        if count <= 1:
            # a query that sees no key: 0, and -infinity
            sums = tl.where((total == 0)[:, None], 0.0, sums / tl.where(total == 0, 1.0, total)[:, None])
            to = output + batch * output_batch + (head * output_head + index.to(tl.int64) * output_row)[:, None]
            tl.store(to + dims[None, :], sums.to(output.dtype.element_ty), within)
            natural = tl.where(total == 0, float("-inf"), largest + tl.log(tl.where(total == 0, 1.0, total)))
            tl.store(logsumexp + flat, natural, real)
        else:
            part = flat * most + split
            tl.store(partials + (part * value_dim)[:, None] + dims[None, :], sums, within)
            tl.store(states + part * 2, largest, real)
            tl.store(states + part * 2 + 1, total, real)


@triton.jit(do_not_specialize=NUMBERS)
def combine_kernel(
    partials, states, output, logsumexp, cache_lengths, output_batch, output_head, output_row,
    heads, kv_heads, queries, capacity, value_dim, has_new, window_left, num_splits, most,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The output and logsumexp of a row that has several splits."""
    output_batch, output_head, output_row = in_eights(output_batch), in_eights(output_head), in_eights(output_row)
    value_dim = value_dim * 8  # likewise
    flat = tl.program_id(0).to(tl.int64)
    index = flat % queries
    head = flat // queries % heads
    batch = flat // queries // heads
    length = length_of(cache_lengths, batch, queries, has_new)
    _, _, _, _, count = splits_of(length, queries, capacity, window_left, kv_heads, num_splits)
    if count > 1:
        dims = tl.arange(0, BLOCK_D)
        largest = float("-inf")
        total = 0.0
        sums = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, count, BLOCK_S):
            splits = first + tl.arange(0, BLOCK_S)
            there = splits < count
            at = flat * most + splits
            own = tl.load(states + at * 2, there, other=float("-inf"))
            weight = tl.load(states + at * 2 + 1, there, other=0.0)
            now = tl.maximum(largest, tl.max(own, 0))
            shift = tl.where(now == float("-inf"), 0.0, now)
            factors = tl.exp2((own - shift) * LOG2_E)
            before = tl.exp2((largest - shift) * LOG2_E)
            parts = tl.load(
                partials + (at * value_dim)[:, None] + dims[None, :],
                there[:, None] & (dims < value_dim)[None, :], other=0.0,
            )  # fmt: skip
            sums = sums * before + tl.sum(parts * factors[:, None], 0)
            total = total * before + tl.sum(weight * factors, 0)
            largest = now
        sums = tl.where(total == 0, 0.0, sums / tl.where(total == 0, 1.0, total))
        to = output + batch * output_batch + head * output_head + index * output_row
        tl.store(to + dims, sums.to(output.dtype.element_ty), dims < value_dim)
        natural = tl.where(total == 0, float("-inf"), largest + tl.log(tl.where(total == 0, 1.0, total)))
        tl.store(logsumexp + flat, natural)


# ---- launchers -------------------------------------------------------------------------------------------------


def blocks_for(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_N, BLOCK_D, num_warps and num_stages of split_kernel for the larger of the two head_dims."""
    block_d = max(32, triton.next_power_of_2(dim))
    if dtype == torch.float32:  # without tensor cores: small tiles, so that nothing spills
        return {"BLOCK_N": 32, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2 if block_d < 256 else 1}
    n, warps, stages = {32: (64, 4, 2), 64: (32, 4, 3), 128: (64, 4, 3), 256: (64, 8, 2)}[block_d]
    return {"BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def most_splits(keys: int, queries: int, window_left: int, kv_heads: int, num_splits: int) -> int:
    """The most splits that a sequence in a cache of so many keys can have."""
    if window_left >= 0:
        keys = min(keys, window_left + queries + STEP.value)
    finest = -(-keys // (STEP.value if num_splits else SMALLEST_SPLIT.value))
    return max(1, min(finest, num_splits or max(1, WANTED_SPLITS.value // kv_heads)))


def with_aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows are not contiguous or its strides no multiples of 8."""
    sizes = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    aligned = tensor.stride(3) == 1 and all(size <= 1 or stride % 8 == 0 for size, stride in sizes)
    return tensor if aligned else tensor.contiguous()


def strides_of(tensor: Tensor, order: tuple[int, ...] = (0, 1, 2)) -> list[int]:
    """Eighths of the strides of the first three dimensions; that of a dimension of one element is never used."""
    return [tensor.stride(d) // 8 if tensor.shape[d] > 1 else 0 for d in order]


def decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Q, E), laid out as (B, Q, N, E), and logsumexp (B, N, Q) in float32; appends to the caches.

    `options` are those of lmengine/ops/decoding.py's ARGUMENTS.
    """
    batch, heads, queries, head_dim = query.shape
    value_dim = value_cache.shape[3]
    output = query.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    logsumexp = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if logsumexp.numel() == 0:
        return output, logsumexp
    query = with_aligned_rows(query)
    table, cos, sin, slopes = (options[name] for name in ("block_table", "rotary_cos", "rotary_sin", "alibi_slopes"))
    paged = table is not None
    kv_heads = key_cache.shape[2 if paged else 1]
    order = (0, 2, 1) if paged else (0, 1, 2)
    key_strides, value_strides = (strides_of(cache, order) for cache in (key_cache, value_cache))
    page_size = key_cache.shape[1] if paged else 1
    max_blocks = table.shape[1] if paged else 0
    capacity = max_blocks * page_size if paged else key_cache.shape[2]
    pages = (int(paged), max_blocks, key_cache.shape[0], max(page_size, 1))
    has_new = int(options["key"] is not None)
    eighths = (head_dim // 8, value_dim // 8)
    table = table if paged else cache_lengths  # not looked at

    slots = (heads if cos is not None else 0) + 2 * kv_heads * has_new
    if slots:
        rotated = query.new_empty(batch, heads, queries, head_dim)
        new_key, new_value = (with_aligned_rows(options[name]) if has_new else query for name in ("key", "value"))
        rotary = (0, 0) if cos is None else (2 * cos.shape[1], cos.shape[0])
        tables = (query, query) if cos is None else (cos, sin)
        prepare_kernel[(batch * slots * queries,)](
            query, new_key, new_value, key_cache, value_cache, rotated, cache_lengths, table, *tables,
            *strides_of(query), *strides_of(new_key), *strides_of(new_value), *key_strides, *value_strides,
            heads, kv_heads, queries, capacity, *eighths, has_new, *pages, *rotary,
            int(options["rotary_interleaved"]), BLOCK_D=256, num_warps=1,
        )  # fmt: skip
        query = query if cos is None else rotated

    window_left, num_splits = options["window_left"], options["num_splits"]
    most = most_splits(capacity, queries, window_left, kv_heads, num_splits)
    tiles = triton.cdiv(heads // kv_heads * queries, BLOCK_M)
    partials = query.new_empty(batch * heads * queries * most * value_dim if most > 1 else 0, dtype=torch.float32)
    states = query.new_empty(batch * heads * queries * most * 2 if most > 1 else 0, dtype=torch.float32)
    chosen = blocks_for(max(head_dim, value_dim), query.dtype)
    has_slopes = int(slopes is not None)
    slopes_batch = slopes.stride(0) if slopes is not None and len(slopes) > 1 else 0
    split_kernel[(batch * kv_heads * tiles * most,)](
        query, key_cache, value_cache, output, logsumexp, partials, states, cache_lengths, table,
        logsumexp if slopes is None else slopes, *strides_of(query), *key_strides, *value_strides,
        *strides_of(output), slopes_batch, heads, kv_heads, queries, capacity, *eighths, has_new, *pages,
        has_slopes, window_left, num_splits, most, tiles, options["scale"], options["softcap"], BLOCK_M=BLOCK_M,
        **chosen,
    )  # fmt: skip
    if most > 1:
        combine_kernel[(batch * heads * queries,)](
            partials, states, output, logsumexp, cache_lengths, *strides_of(output), heads, kv_heads, queries,
            capacity, eighths[1], has_new, window_left, num_splits, most, BLOCK_S=BLOCK_S, BLOCK_D=chosen["BLOCK_D"],
            num_warps=4,
        )  # fmt: skip
    return output, logsumexp


# ---- for inspection without a GPU --------------------------------------------------------------------------------


def static_configurations() -> list[StaticConfiguration]:
    """All that may be launched: split and combine for each dtype and padded head_dim, prepare for each pair of dtypes."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    same = ("query", "key_cache", "value_cache", "output", "new_key", "new_value", "rotated")
    single = ("logsumexp", "partials", "states", "slopes")

    def configuration(name, kernel, dtype, constants, warps, stages, table="fp32", quick=False):
        kinds = {"cos": f"*{table}", "sin": f"*{table}", "scale": "fp32", "softcap": "fp32"}
        kinds |= dict.fromkeys(same, f"*{dtype}") | dict.fromkeys(single, "*fp32")
        kinds |= dict.fromkeys(("cache_lengths", "block_table"), "*i32")
        signature = {a: kinds.get(a, "i32") for a in kernel.arg_names if a not in constants}
        matrix = dtype != "fp32" and kernel is split_kernel
        return StaticConfiguration(
            f"decoding {name}", kernel, signature, constants, warps, stages, matrix_instructions=matrix, quick=quick
        )  # fmt: skip

    found = []
    for dtype, name in names.items():
        for dim in (32, 64, 128, 256):
            chosen = blocks_for(dim, dtype)
            sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": chosen["BLOCK_N"], "BLOCK_D": dim}
            warps, stages = chosen["num_warps"], chosen["num_stages"]
            quick = name == "bf16" or (name == "fp32" and dim == 256)
            found.append(configuration(f"split {name} d{dim}", split_kernel, name, sizes, warps, stages, quick=quick))
            sizes = {"BLOCK_S": BLOCK_S, "BLOCK_D": dim}
            found.append(
                configuration(
                    f"combine {name} d{dim}", combine_kernel, name, sizes, 4, 3, quick=name == "bf16" and dim == 256
                )
            )
        for table in sorted({"fp32", name}):
            what, sizes = f"prepare {name}, tables {table}", {"BLOCK_D": 256}
            found.append(
                configuration(what, prepare_kernel, name, sizes, 1, 3, table, quick=name == "bf16" and table == "fp32")
            )
    return found
