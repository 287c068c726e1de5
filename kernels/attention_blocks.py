"""What attention's Triton kernels share: which blocks of keys a block of queries sees, scores, dropout, reading rows.

The arithmetic is that of csrc/attention/sequence.h and dropout.h. An argument of an option that a call lacks is None,
and leaves no trace in the compiled kernel. What belongs together goes from function to function in tuples:

limits: query_length, key_length, offset, prefix, prefix_lengths, left, right
        of the sequence; a query's position minus its index; the keys that every query sees; the window
masking: mask, mask_row, mask_column
        the mask of the batch and head, and its strides
scoring: scale, softcap, slope, alibi_slopes
dropping: seed, head_number, threshold, dropout_factor
        the seed as a pointer; batch * heads + head; see dropout.h
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# integers of which a kernel is not compiled anew where they are 1 or multiples of 16
UNSPECIALISED = [
    *(f"{tensor}_{dimension}"
      for tensor in ("query", "key", "value", "output", "grad") for dimension in ("batch", "head", "row")),
    "mask_batch", "mask_head", "grad_mask_batch", "grad_mask_head", "slopes_batch", "heads", "query_length",
    "key_length", "query_rows", "left", "right", "threshold",
]  # fmt: skip


@triton.jit
def weights_of(scores, shift, AFTER: tl.constexpr):
    """exp2((scores - shift) * AFTER), at most 1.

    A weight never exceeds 1, but scores of 1e8 are 8 apart in float32: computed again in another order, or fused into
    the difference, one may exceed the shift by so much that exp2 overflows. A NaN passes.
    """
    return tl.exp2(tl.minimum(scores - shift, 0.0, propagate_nan=tl.PropagateNan.ALL) * AFTER)


@triton.jit
def place_of(length, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The block, batch and head of a program. The grid is one-dimensional: batch * heads may exceed its other sizes.

    With LAST_FIRST the last block of a head comes first: under a causal mask it has the most work.
    """
    count = tl.cdiv(length, BLOCK)
    block = tl.program_id(0) % count
    if LAST_FIRST:
        block = count - 1 - block
    pid = tl.program_id(0) // count
    return block, (pid // heads).to(tl.int64), (pid % heads).to(tl.int64)


@triton.jit
def sequence_of(batch, query_length, key_length, prefix_lengths, key_lengths, cu_query, cu_key,
                BOTTOM_RIGHT: tl.constexpr):  # fmt: skip
    """Of one sequence: its first query and key in the tensors, the number of queries, of keys, and of keys that are no
    padding, the position of query 0, and the number of keys that every query sees."""
    query_begin = batch * 0
    key_begin = batch * 0
    if cu_query is not None:
        query_begin = tl.load(cu_query + batch).to(tl.int64)
        query_length = (tl.load(cu_query + batch + 1) - query_begin).to(tl.int32)
        key_begin = tl.load(cu_key + batch).to(tl.int64)
        key_length = (tl.load(cu_key + batch + 1) - key_begin).to(tl.int32)
    stored = key_length
    if key_lengths is not None:
        key_length = tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), key_length)
    offset = 0
    if BOTTOM_RIGHT:
        offset = key_length - query_length
    prefix = 0
    if prefix_lengths is not None:
        prefix = tl.minimum(tl.maximum(tl.load(prefix_lengths + batch), 0), key_length)
    return query_begin, key_begin, query_length, stored, key_length, offset, prefix


@triton.jit
def extras_of(batch, head, heads, mask, mask_batch, mask_head, mask_row, mask_column, alibi_slopes, slopes_batch, scale,
              softcap, seed, threshold, dropout_factor):  # fmt: skip
    """The tuples masking, scoring and dropping of a head."""
    if mask is not None:
        mask += batch * mask_batch + head * mask_head
    slope = 0.0
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch * slopes_batch + head)
    masking = (mask, mask_row, mask_column)
    scoring = (scale, softcap, slope, alibi_slopes)
    dropping = (seed, batch * heads + head, threshold, dropout_factor)
    return masking, scoring, dropping


@triton.jit
def singles_of(batch, head, heads, query_rows, cu_query):
    """Where the numbers of a head's queries begin in logsumexp and delta, (B, N, Q), or (1, N, all queries) packed."""
    if cu_query is not None:
        return head * query_rows
    return (batch * heads + head) * query_rows


# ---- blocks ----------------------------------------------------------------------------------------------------


@triton.jit
def key_blocks_of(first, limits, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The blocks of N keys that queries [first, first + M) see: whole, partly, begin, full_begin, full_end, end.

    The prefix is in the blocks [0, partly), and [0, whole) of them every query sees in full. The window is in [begin,
    end), where it does not overlap these, and [full_begin, full_end) every query sees in full. Without SPLIT no block
    counts as full.
    """
    query_length, key_length, offset, prefix, _, left, right = limits
    last = tl.minimum(first + M, query_length) - 1
    low = 0
    high = key_length
    low_of_all = 0
    high_of_all = key_length
    if left is not None:
        low = tl.maximum(first + offset - left, 0)
        low_of_all = tl.maximum(last + offset - left, 0)
    if right is not None:
        high = tl.maximum(tl.minimum(last + offset + right + 1, key_length), 0)
        high_of_all = tl.maximum(tl.minimum(first + offset + right + 1, key_length), 0)
    partly = tl.cdiv(prefix, N)
    begin = tl.maximum(low // N, partly)
    end = tl.maximum(tl.cdiv(high, N), begin)
    whole = 0
    full_begin = begin
    full_end = begin
    if SPLIT:
        whole = prefix // N
        full_begin = tl.minimum(tl.maximum(tl.cdiv(low_of_all, N), begin), end)
        full_end = tl.minimum(tl.maximum(high_of_all // N, full_begin), end)
    return whole, partly, begin, full_begin, full_end, end


@triton.jit
def query_blocks_of(first, limits, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The blocks of M queries that see any of the keys [first, first + N): begin, full_begin, full_end, end.

    [full_begin, full_end) see all of them, and have M queries.
    """
    query_length, key_length, offset, prefix, _, left, right = limits
    last = tl.minimum(first + N, key_length) - 1
    low = 0
    high = query_length
    low_of_all = 0
    high_of_all = query_length
    if right is not None:
        low = tl.where(first < prefix, 0, tl.maximum(first - offset - right, 0))
        low_of_all = tl.where(last < prefix, 0, tl.maximum(last - offset - right, 0))
    if left is not None:
        high = tl.where(first < prefix, high, tl.maximum(tl.minimum(last - offset + left + 1, high), 0))
        high_of_all = tl.where(last < prefix, high, tl.maximum(tl.minimum(first - offset + left + 1, high), 0))
    high = tl.where(first < key_length, high, 0)
    begin = low // M
    end = tl.maximum(tl.cdiv(high, M), begin)
    full_begin = begin
    full_end = begin
    if SPLIT:
        full_begin = tl.minimum(tl.maximum(tl.cdiv(low_of_all, M), begin), end)
        full_end = tl.minimum(tl.maximum(high_of_all // M, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit
def one_of(i, begin, full_begin, full_end):
    """Block i of [begin, full_begin) and of those from full_end on."""
    return tl.where(i < full_begin - begin, begin + i, full_end + i - (full_begin - begin))


@triton.jit
def load_mask(i, j, first, begin, limits, masking):
    """The mask of queries first + i and keys begin + j, tensors that broadcast with each other; 0 without a mask."""
    mask, mask_row, mask_column = masking
    if mask is not None:
        there = (i < limits[0] - first) & (j < limits[1] - begin)
        mask += first.to(tl.int64) * mask_row + begin.to(tl.int64) * mask_column
        return tl.load(mask + (i * mask_row + j * mask_column), there, other=0)
    else:
        return 0


@triton.jit
def sees(i, j, marks, limits, masking):
    """Whether query i sees key j; `marks` are load_mask's."""
    _, key_length, offset, prefix, prefix_lengths, left, right = limits
    seen = j < key_length
    if left is not None:
        seen = seen & (j - i - offset >= -left)
    if right is not None:
        seen = seen & (j - i - offset <= right)
    if prefix_lengths is not None:
        seen = seen | (j < prefix)
    if masking[0] is not None:  # noqa: SIM102 (Triton compiles both sides of an `and`)
        if masking[0].dtype.element_ty == tl.uint8:
            seen = seen & (marks != 0)
    return seen


# ---- scores ----------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """As exact as float32 is, near 0 too, where 1 - exp(-2x) is not."""
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - small) / (1.0 + small)
    square = x * x
    near = x + x * square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def scores_of(product, i, j, marks, limits, masking, scoring, BEFORE: tl.constexpr):
    """The scores of query key^T times BEFORE, and the derivative of the soft-capping, 1 without."""
    scale, softcap, slope, alibi_slopes = scoring
    slack = 1.0
    if softcap is not None:
        bent = tanh(product * (scale / softcap))
        slack = 1.0 - bent * bent
        scores = bent * (softcap * BEFORE)
    else:
        scores = product * (scale * BEFORE)
    if masking[0] is not None:  # noqa: SIM102
        if masking[0].dtype.element_ty != tl.uint8:
            scores += marks.to(tl.float32) * BEFORE
    if alibi_slopes is not None:
        scores -= tl.abs(j - i - limits[2]).to(tl.float32) * (slope * BEFORE)
    return scores, slack


@triton.jit
def kept_by_dropout(first_row, first_column, dropping, M: tl.constexpr, N: tl.constexpr):
    """Which of (M, N) weights dropout keeps; first_column is a multiple of 4. A block of Philox has four words."""
    seed, head_number, threshold, _ = dropping
    rows = (first_row + tl.arange(0, M))[:, None]
    quads = (first_column // 4 + tl.arange(0, N // 4))[None, :]
    c0, c1 = tl.broadcast(quads, rows)
    c2 = tl.zeros_like(c0) + head_number.to(tl.int32)
    c3 = tl.zeros_like(c0) + (head_number >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3, 7)
    limit = threshold.to(tl.uint32, bitcast=True)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (M, N)) != 0


# ---- rows ------------------------------------------------------------------------------------------------------


@triton.jit
def offset_of(batch, batch_stride, head, head_stride, row, row_stride, ALIGN: tl.constexpr):
    """Where a row begins, in elements, all of 64 bits; it is a multiple of ALIGN."""
    # each product is marked by itself: the mark is lost with a sum that is simplified
    batches = tl.multiple_of(batch * batch_stride, [ALIGN])
    heads = tl.multiple_of(head * head_stride, [ALIGN])
    return batches + heads + tl.multiple_of(row.to(tl.int64) * row_stride, [ALIGN])


@triton.jit
def places_of(stride, COUNT: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """(COUNT, BLOCK) offsets of rows that follow each other: 32 bits are enough (the launcher sees to it)."""
    return tl.multiple_of(tl.arange(0, COUNT)[:, None] * stride, [ALIGN, ALIGN]) + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_rows(pointer, stride, count, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
              ALL: tl.constexpr):  # fmt: skip
    """(COUNT, BLOCK): rows from `pointer` on, zeros from row `count` on (not looked at with ALL) and behind DIM."""
    places = pointer + places_of(stride, COUNT, BLOCK, ALIGN)
    if ALL:
        if DIM == BLOCK:
            return tl.load(places)
        return tl.load(places, (tl.arange(0, BLOCK) < DIM)[None, :], other=0.0)
    there = (tl.arange(0, COUNT) < count)[:, None]
    if DIM != BLOCK:
        there = there & (tl.arange(0, BLOCK) < DIM)[None, :]
    return tl.load(places, there, other=0.0)


@triton.jit
def load_block(source, stride, batch, head, begin, count, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
               ALIGN: tl.constexpr, ALL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows [begin, begin + COUNT) of a head as load_rows gives them; with TMA from a descriptor of the whole tensor,
    otherwise from the pointer to the head's row 0."""
    if TMA:
        return source.load([batch.to(tl.int32), head.to(tl.int32), begin, 0]).reshape([COUNT, BLOCK])
    else:
        return load_rows(source + begin.to(tl.int64) * stride, stride, count, COUNT, DIM, BLOCK, ALIGN, ALL)


@triton.jit
def product_of_rows(a, a_stride, a_count, b, b_stride, b_count, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr,
                    ALIGN: tl.constexpr):  # fmt: skip
    """(A, B): the rows from pointer `a` on times those from `b` on, read 64 columns at a time.

    For float32 rows of more than 64, of which a thread without tensor cores would keep whole ones in its registers.
    """
    sums = tl.zeros([A, B], tl.float32)
    for column in range(0, DIM, 64):
        within = (column + tl.arange(0, 64) < DIM)[None, :]
        x = tl.load(a + column + places_of(a_stride, A, 64, ALIGN), (tl.arange(0, A) < a_count)[:, None] & within, 0.0)
        y = tl.load(b + column + places_of(b_stride, B, 64, ALIGN), (tl.arange(0, B) < b_count)[:, None] & within, 0.0)
        sums = tl.dot(x, tl.trans(y), sums, input_precision="ieee")
    return sums


@triton.jit
def store_rows(pointer, stride, count, values, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
               ALIGN: tl.constexpr):  # fmt: skip
    there = (tl.arange(0, COUNT) < count)[:, None]
    if DIM != BLOCK:
        there = there & (tl.arange(0, BLOCK) < DIM)[None, :]
    tl.store(pointer + places_of(stride, COUNT, BLOCK, ALIGN), values.to(pointer.dtype.element_ty), there)
