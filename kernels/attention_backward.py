"""Attention's backward in Triton: a kernel for the gradients of keys and values, and one for those of queries and mask.

B: batch, N: heads, M: heads of keys and values, Q: query length, K: key length, D: head_dim, E: the values' head_dim.
Both compute the weights again from the logsumexp (Dao et al. 2022). Only a mask that broadcasts needs atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from lmengine.kernels.attention_blocks import (
    LOG2_E,
    UNSPECIALISED,
    extras_of,
    kept_by_dropout,
    key_blocks_of,
    load_block,
    load_mask,
    load_rows,
    offset_of,
    one_of,
    place_of,
    product_of_rows,
    query_blocks_of,
    scores_of,
    sees,
    sequence_of,
    singles_of,
    store_rows,
    weights_of,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def delta_kernel(
    grad_output, output, delta, grad_batch, grad_head, grad_row, output_batch, output_head, output_row,
    heads, query_length, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """delta (B, N, Q): the sum over E of grad_output * output."""
    block, batch, head = place_of(query_length, heads, BLOCK_M, False)
    first = block * BLOCK_M
    count = query_length - first
    grad_output += offset_of(batch, grad_batch, head, grad_head, first, grad_row, ALIGN)
    output += offset_of(batch, output_batch, head, output_head, first, output_row, ALIGN)
    grad = load_rows(grad_output, grad_row, count, BLOCK_M, VALUE_DIM, BLOCK_E, ALIGN, False)
    out = load_rows(output, output_row, count, BLOCK_M, VALUE_DIM, BLOCK_E, ALIGN, False)
    sums = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    delta += (batch * heads + head) * query_length + first
    tl.store(delta + tl.arange(0, BLOCK_M), sums, tl.arange(0, BLOCK_M) < count)


@triton.jit
def load_shifts(logsumexp, places, there):
    """logsumexp, and infinity for a query that sees no key, so that its weights are 0 and not NaN."""
    shift = tl.load(logsumexp + places, there, other=float("inf"))
    return tl.where(shift == float("-inf"), float("inf"), shift)


# ---- keys and values -------------------------------------------------------------------------------------------


@triton.jit
def add_queries(
    block, first, batch, head, for_key, for_value, k, v, keys, query, grad_output, logsumexp, delta, query_row,
    grad_row, limits, masking, scoring, dropping, BEFORE: tl.constexpr, AFTER: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, ALIGN: tl.constexpr, TMA: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One block of queries into the gradients of the keys and values from `first` on."""
    begin = block * BLOCK_M
    count = limits[0] - begin
    rows = begin + tl.arange(0, BLOCK_M)
    there = rows < limits[0]
    q = load_block(query, query_row, batch, head, begin, count, BLOCK_M, HEAD_DIM, BLOCK_D, ALIGN, FULL, TMA)
    key, value, key_row, value_row = keys
    if k is None:
        at = begin.to(tl.int64)
        scores = product_of_rows(
            key, key_row, limits[1] - first, query + at * query_row, query_row, count, BLOCK_N, BLOCK_M, HEAD_DIM, ALIGN
        )
        grad_weights = product_of_rows(
            value, value_row, limits[1] - first, grad_output + at * grad_row, grad_row, count, BLOCK_N, BLOCK_M,
            VALUE_DIM, ALIGN,
        )  # fmt: skip
    else:
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
    shift = load_shifts(logsumexp, rows, there) * BEFORE
    slack = 1.0
    if FULL:
        weights = weights_of(scores * (scoring[0] * BEFORE), shift[None, :], AFTER)
    else:
        i = tl.arange(0, BLOCK_M)[None, :]
        j = tl.arange(0, BLOCK_N)[:, None]
        marks = load_mask(i, j, begin, first, limits, masking)
        scores, slack = scores_of(scores, begin + i, first + j, marks, limits, masking, scoring, BEFORE)
        seen = sees(begin + i, first + j, marks, limits, masking)
        weights = tl.where(seen, weights_of(scores, shift[None, :], AFTER), 0.0)
    grad = load_block(grad_output, grad_row, batch, head, begin, count, BLOCK_M, VALUE_DIM, BLOCK_E, ALIGN, FULL, TMA)
    if k is not None:
        grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
    minus = tl.load(delta + rows, there, other=0.0)
    if dropping[0] is not None:
        kept = tl.trans(kept_by_dropout(begin, first, dropping, BLOCK_M, BLOCK_N))
        grad_weights = tl.where(kept, grad_weights * dropping[3], 0.0)
        dropped = tl.where(kept, weights * dropping[3], 0.0)
        for_value = tl.dot(dropped.to(grad.dtype), grad, for_value, input_precision="ieee")
    else:
        for_value = tl.dot(weights.to(grad.dtype), grad, for_value, input_precision="ieee")
    grad_scores = weights * (grad_weights - minus[None, :]) * slack
    for_key = tl.dot(grad_scores.to(q.dtype), q, for_key, input_precision="ieee")
    return for_key, for_value


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_key_value_kernel(
    query, key, value, grad_output, logsumexp, delta, grad_key, grad_value,
    mask, alibi_slopes, prefix_lengths, key_lengths, cu_query, cu_key, seed,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, grad_key_batch, grad_key_head, grad_key_row, grad_value_batch, grad_value_head,
    grad_value_row, mask_batch, mask_head, mask_row, mask_column, slopes_batch,
    heads, groups, query_length, key_length, query_rows, left, right, scale, softcap, threshold, dropout_factor,
    BOTTOM_RIGHT: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """grad_key (B, M, K, D) and grad_value (B, M, K, E): a program has BLOCK_N keys of a head of keys, and goes through
    all heads of queries that use them. With TMA query and grad_output are tensor descriptors."""
    before: tl.constexpr = 1.0 if key.dtype.element_ty == tl.float32 else LOG2_E
    after: tl.constexpr = LOG2_E if key.dtype.element_ty == tl.float32 else 1.0
    block, batch, key_head_index = place_of(key_length, heads // groups, BLOCK_N, False)
    first = block * BLOCK_N
    query_begin, key_begin, query_length, stored, key_length, offset, prefix = sequence_of(
        batch, query_length, key_length, prefix_lengths, key_lengths, cu_query, cu_key, BOTTOM_RIGHT
    )
    if first >= stored:
        return
    count = key_length - first
    limits = (query_length, key_length, offset, prefix, prefix_lengths, left, right)
    rows = key_begin + first
    key += offset_of(batch, key_batch, key_head_index, key_head, rows, key_row, ALIGN)
    value += offset_of(batch, value_batch, key_head_index, value_head, rows, value_row, ALIGN)
    keys = (key, value, key_row, value_row)
    long: tl.constexpr = key.dtype.element_ty == tl.float32 and (BLOCK_D > 64 or BLOCK_E > 64)
    if long:
        k: tl.constexpr = None
        v: tl.constexpr = None
    else:
        k = load_rows(key, key_row, count, BLOCK_N, HEAD_DIM, BLOCK_D, ALIGN, False)
        v = load_rows(value, value_row, count, BLOCK_N, VALUE_DIM, BLOCK_E, ALIGN, False)
    for_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for_value = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    begin, full_begin, full_end, end = query_blocks_of(first, limits, SPLIT, BLOCK_M, BLOCK_N)
    for member in range(0, groups):
        head = key_head_index * groups + member
        masking, scoring, dropping = extras_of(
            batch, head, heads, mask, mask_batch, mask_head, mask_row, mask_column, alibi_slopes, slopes_batch, scale,
            softcap, seed, threshold, dropout_factor,
        )  # fmt: skip
        queries = query
        grads = grad_output
        if not TMA:
            queries += offset_of(batch, query_batch, head, query_head, query_begin, query_row, ALIGN)
            grads += offset_of(batch, grad_batch, head, grad_head, query_begin, grad_row, ALIGN)
        singles = singles_of(batch, head, heads, query_rows, cu_query) + query_begin
        if SPLIT:
            for m in range(full_begin, full_end):
                for_key, for_value = add_queries(
                    m, first, batch, head, for_key, for_value, k, v, keys, queries, grads, logsumexp + singles,
                    delta + singles, query_row, grad_row, limits, masking, scoring, dropping, before, after, HEAD_DIM,
                    VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, ALIGN, TMA, True,
                )  # fmt: skip
        for m in range(0, full_begin - begin + end - full_end):
            for_key, for_value = add_queries(
                one_of(m, begin, full_begin, full_end), first, batch, head, for_key, for_value, k, v, keys, queries,
                grads, logsumexp + singles, delta + singles, query_row, grad_row, limits, masking, scoring, dropping, before,
                after, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, ALIGN, TMA, False,
            )  # fmt: skip
    # keys behind key_length are padding: 0
    there = (tl.arange(0, BLOCK_N) < count)[:, None]
    for_key = tl.where(there, for_key * scale, 0.0)
    for_value = tl.where(there, for_value, 0.0)
    grad_key += offset_of(batch, grad_key_batch, key_head_index, grad_key_head, rows, grad_key_row, ALIGN)
    store_rows(grad_key, grad_key_row, stored - first, for_key, BLOCK_N, HEAD_DIM, BLOCK_D, ALIGN)
    grad_value += offset_of(batch, grad_value_batch, key_head_index, grad_value_head, rows, grad_value_row, ALIGN)
    store_rows(grad_value, grad_value_row, stored - first, for_value, BLOCK_N, VALUE_DIM, BLOCK_E, ALIGN)


# ---- queries and mask ------------------------------------------------------------------------------------------


@triton.jit
def add_key_gradients(
    block, first, batch, head, sums, q, grad, shift, minus, key, value, key_row, value_row, limits, masking, scoring,
    dropping, grad_mask, grad_mask_row, grad_mask_column, GRAD_MASK: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr, TMA: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One block of keys into the gradients of the queries from `first` on, and of the mask."""
    begin = block * BLOCK_N
    count = limits[1] - begin
    k = load_block(key, key_row, batch, head, begin, count, BLOCK_N, HEAD_DIM, BLOCK_D, ALIGN, FULL, TMA)
    v = load_block(value, value_row, batch, head, begin, count, BLOCK_N, VALUE_DIM, BLOCK_E, ALIGN, FULL, TMA)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    slack = 1.0
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    if FULL:
        weights = weights_of(scores * (scoring[0] * BEFORE), shift[:, None], AFTER)
    else:
        marks = load_mask(i, j, first, begin, limits, masking)
        scores, slack = scores_of(scores, first + i, begin + j, marks, limits, masking, scoring, BEFORE)
        seen = sees(first + i, begin + j, marks, limits, masking)
        weights = tl.where(seen, weights_of(scores, shift[:, None], AFTER), 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    if dropping[0] is not None:
        kept = kept_by_dropout(first, begin, dropping, BLOCK_M, BLOCK_N)
        grad_weights = tl.where(kept, grad_weights * dropping[3], 0.0)
    grad_scores = weights * (grad_weights - minus[:, None])
    if GRAD_MASK != "none":
        grad_mask += first.to(tl.int64) * grad_mask_row + begin.to(tl.int64) * grad_mask_column
    if GRAD_MASK == "sums":  # of a mask that is the same for all queries
        places = grad_mask + tl.arange(0, BLOCK_N) * grad_mask_column
        tl.atomic_add(places, tl.sum(grad_scores, 0), tl.arange(0, BLOCK_N) < count, sem="relaxed")
    elif GRAD_MASK != "none":
        there = (i < limits[0] - first) & (j < count)
        places = grad_mask + (i * grad_mask_row + j * grad_mask_column)
        if GRAD_MASK == "add":
            tl.atomic_add(places, grad_scores, there, sem="relaxed")
        else:
            tl.store(places, grad_scores, there)
    return tl.dot((grad_scores * slack).to(k.dtype), k, sums, input_precision="ieee")


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_query_kernel(
    query, key, value, grad_output, logsumexp, delta, grad_query, grad_mask,
    mask, alibi_slopes, prefix_lengths, key_lengths, cu_query, cu_key, seed,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, grad_query_batch, grad_query_head, grad_query_row,
    grad_mask_batch, grad_mask_head, grad_mask_row, grad_mask_column,
    mask_batch, mask_head, mask_row, mask_column, slopes_batch,
    heads, groups, query_length, key_length, query_rows, left, right, scale, softcap, threshold, dropout_factor,
    GRAD_MASK: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, ALIGN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """grad_query (B, N, Q, D), and grad_mask, which holds zeros: GRAD_MASK is "none", "store", "add" where it
    broadcasts, or "sums" where it has one row for all queries. With TMA key and value are tensor descriptors."""
    before: tl.constexpr = 1.0 if query.dtype.element_ty == tl.float32 else LOG2_E
    after: tl.constexpr = LOG2_E if query.dtype.element_ty == tl.float32 else 1.0
    block, batch, head = place_of(query_length, heads, BLOCK_M, right is not None)
    first = block * BLOCK_M
    query_begin, key_begin, query_length, _, key_length, offset, prefix = sequence_of(
        batch, query_length, key_length, prefix_lengths, key_lengths, cu_query, cu_key, BOTTOM_RIGHT
    )
    if first >= query_length:
        return
    count = query_length - first
    limits = (query_length, key_length, offset, prefix, prefix_lengths, left, right)
    masking, scoring, dropping = extras_of(
        batch, head, heads, mask, mask_batch, mask_head, mask_row, mask_column, alibi_slopes, slopes_batch, scale,
        softcap, seed, threshold, dropout_factor,
    )  # fmt: skip
    if GRAD_MASK != "none":
        grad_mask += batch * grad_mask_batch + head * grad_mask_head
    rows = query_begin + first
    query += offset_of(batch, query_batch, head, query_head, rows, query_row, ALIGN)
    grad_output += offset_of(batch, grad_batch, head, grad_head, rows, grad_row, ALIGN)
    if not TMA:
        key += offset_of(batch, key_batch, head // groups, key_head, key_begin, key_row, ALIGN)
        value += offset_of(batch, value_batch, head // groups, value_head, key_begin, value_row, ALIGN)
    q = load_rows(query, query_row, count, BLOCK_M, HEAD_DIM, BLOCK_D, ALIGN, False)
    grad = load_rows(grad_output, grad_row, count, BLOCK_M, VALUE_DIM, BLOCK_E, ALIGN, False)
    singles = singles_of(batch, head, heads, query_rows, cu_query) + rows
    there = tl.arange(0, BLOCK_M) < count
    shift = load_shifts(logsumexp + singles, tl.arange(0, BLOCK_M), there) * before
    minus = tl.load(delta + singles + tl.arange(0, BLOCK_M), there, other=0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole, partly, begin, full_begin, full_end, end = key_blocks_of(first, limits, SPLIT, BLOCK_M, BLOCK_N)
    if SPLIT:
        for n in range(0, whole + full_end - full_begin):
            sums = add_key_gradients(
                tl.where(n < whole, n, full_begin + n - whole), first, batch, head // groups, sums, q, grad, shift,
                minus, key, value, key_row, value_row, limits, masking, scoring, dropping, grad_mask, grad_mask_row,
                grad_mask_column, GRAD_MASK, before, after, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
                ALIGN, TMA, True,
            )  # fmt: skip
    partly -= whole
    for n in range(0, partly + full_begin - begin + end - full_end):
        sums = add_key_gradients(
            tl.where(n < partly, whole + n, one_of(n - partly, begin, full_begin, full_end)), first, batch,
            head // groups, sums, q, grad, shift, minus, key, value, key_row, value_row, limits, masking, scoring,
            dropping, grad_mask, grad_mask_row, grad_mask_column, GRAD_MASK, before, after, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, ALIGN, TMA, False,
        )  # fmt: skip
    grad_query += offset_of(batch, grad_query_batch, head, grad_query_head, rows, grad_query_row, ALIGN)
    store_rows(grad_query, grad_query_row, count, sums * scale, BLOCK_M, HEAD_DIM, BLOCK_D, ALIGN)
