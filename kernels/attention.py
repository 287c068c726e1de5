"""Softmax attention in Triton: forward, and a backward of two kernels without atomics, one for the gradients of keys and
values and one for that of the queries.

B: batch, N: heads, Q: query length, K: key length, D: head_dim. A program has BLOCK_M queries or BLOCK_N keys of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from lmengine.kernels.configuration import StaticConfiguration
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def weights_of(scores, shift, AFTER: tl.constexpr):
    """exp2((scores - shift) * AFTER), at most 1.

    A weight never exceeds 1, but scores of 1e8 are 8 apart in float32: computed again in another order, or fused into
    the difference, one may exceed the shift by so much that exp2 overflows. A NaN passes.
    """
    return tl.exp2(tl.minimum(scores - shift, 0.0, propagate_nan=tl.PropagateNan.ALL) * AFTER)


@triton.jit
def place_of(length, heads, BLOCK: tl.constexpr):
    """The block, batch and head of a program. The grid is one-dimensional: batch * heads may exceed its other sizes."""
    count = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0) // count
    return tl.program_id(0) % count, pid.to(tl.int64), (pid // heads).to(tl.int64), (pid % heads).to(tl.int64)


# ---- forward ---------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    query, key, value, output, logsumexp,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, heads, query_length, key_length, head_dim, scale, is_causal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output (B, N, Q, D) and logsumexp (B, N, Q), natural. Strides are in elements, the last dimension is contiguous."""
    # 16-bit types take the factor log2(e) into the scale. float32 multiplies the small difference by it, because the
    # roundings of scores and logsumexp in two units would be the largest error of the backward.
    before: tl.constexpr = 1.0 if query.dtype.element_ty == tl.float32 else LOG2_E
    after: tl.constexpr = LOG2_E if query.dtype.element_ty == tl.float32 else 1.0
    block, pid, batch, head = place_of(query_length, heads, BLOCK_M)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    within = (rows < query_length)[:, None] & (dims < head_dim)[None, :]
    q = tl.load(
        query + batch * query_batch + head * query_head + rows.to(tl.int64)[:, None] * query_row + dims[None, :],
        within, other=0.0,
    )  # fmt: skip
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = key_length
    if is_causal:
        end = tl.minimum(key_length, (block + 1) * BLOCK_M)
    for begin in range(0, end, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        there = (columns < key_length)[:, None] & (dims < head_dim)[None, :]
        at = columns.to(tl.int64)[:, None]
        k = tl.load(key + at * key_row + dims[None, :], there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * before)
        seen = (columns < key_length)[None, :] & ((columns[None, :] <= rows[:, None]) | (is_causal == 0))
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        weights = weights_of(scores, shift[:, None], after)
        factor = weights_of(largest, shift, after)
        total = total * factor + tl.sum(weights, 1)
        v = tl.load(value + at * value_row + dims[None, :], there, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * factor[:, None], input_precision="ieee")
        largest = now
    # a query that sees no key: 0, and -infinity
    sums = tl.where((total == 0)[:, None], 0.0, sums / tl.where(total == 0, 1.0, total)[:, None])
    tl.store(
        output + batch * output_batch + head * output_head + rows.to(tl.int64)[:, None] * output_row + dims[None, :],
        sums.to(output.dtype.element_ty), within,
    )  # fmt: skip
    natural = tl.where(total == 0, float("-inf"), largest / before + tl.log(tl.where(total == 0, 1.0, total)))
    tl.store(logsumexp + pid * query_length + rows, natural, rows < query_length)


# ---- backward --------------------------------------------------------------------------------------------------


@triton.jit
def delta_kernel(
    grad_output, output, delta, grad_batch, grad_head, grad_row, output_batch, output_head, output_row,
    heads, query_length, head_dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta (B, N, Q): the sum over D of grad_output * output."""
    block, pid, batch, head = place_of(query_length, heads, BLOCK_M)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    within = (rows < query_length)[:, None] & (dims < head_dim)[None, :]
    at = rows.to(tl.int64)[:, None]
    grad = tl.load(
        grad_output + batch * grad_batch + head * grad_head + at * grad_row + dims[None, :], within, other=0.0
    )
    out = tl.load(
        output + batch * output_batch + head * output_head + at * output_row + dims[None, :], within, other=0.0
    )
    sums = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + pid * query_length + rows, sums, rows < query_length)


@triton.jit
def grad_key_value_kernel(
    query, key, value, grad_output, logsumexp, delta, grad_key, grad_value,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, heads, query_length, key_length, head_dim, scale, is_causal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value, both contiguous as (B, K, N, D)."""
    before: tl.constexpr = 1.0 if query.dtype.element_ty == tl.float32 else LOG2_E
    after: tl.constexpr = LOG2_E if query.dtype.element_ty == tl.float32 else 1.0
    block, pid, batch, head = place_of(key_length, heads, BLOCK_N)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    there = (columns < key_length)[:, None] & (dims < head_dim)[None, :]
    at = columns.to(tl.int64)[:, None]
    k = tl.load(key + batch * key_batch + head * key_head + at * key_row + dims[None, :], there, other=0.0)
    v = tl.load(value + batch * value_batch + head * value_head + at * value_row + dims[None, :], there, other=0.0)
    query += batch * query_batch + head * query_head
    grad_output += batch * grad_batch + head * grad_head
    logsumexp += pid * query_length
    delta += pid * query_length
    for_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = 0
    if is_causal:
        first = block * BLOCK_N // BLOCK_M * BLOCK_M
    for begin in range(first, query_length, BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        within = (rows < query_length)[:, None] & (dims < head_dim)[None, :]
        row_at = rows.to(tl.int64)[:, None]
        q = tl.load(query + row_at * query_row + dims[None, :], within, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * before)  # (BLOCK_N, BLOCK_M)
        shift = tl.load(logsumexp + rows, rows < query_length, other=float("inf")) * before
        seen = (columns < key_length)[:, None] & ((columns[:, None] <= rows[None, :]) | (is_causal == 0))
        weights = tl.where(seen, weights_of(scores, shift[None, :], after), 0.0)
        grad = tl.load(grad_output + row_at * grad_row + dims[None, :], within, other=0.0)
        for_value = tl.dot(weights.to(grad.dtype), grad, for_value, input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        minus = tl.load(delta + rows, rows < query_length, other=0.0)
        grad_scores = weights * (grad_weights - minus[None, :])
        for_key = tl.dot(grad_scores.to(q.dtype), q, for_key, input_precision="ieee")
    to = ((batch * key_length + columns.to(tl.int64)) * heads + head)[:, None] * head_dim + dims[None, :]
    tl.store(grad_key + to, (for_key * scale).to(grad_key.dtype.element_ty), there)
    tl.store(grad_value + to, for_value.to(grad_value.dtype.element_ty), there)


@triton.jit
def grad_query_kernel(
    query, key, value, grad_output, logsumexp, delta, grad_query,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row, heads, query_length, key_length, head_dim, scale, is_causal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_query, contiguous as (B, Q, N, D)."""
    before: tl.constexpr = 1.0 if query.dtype.element_ty == tl.float32 else LOG2_E
    after: tl.constexpr = LOG2_E if query.dtype.element_ty == tl.float32 else 1.0
    block, pid, batch, head = place_of(query_length, heads, BLOCK_M)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    within = (rows < query_length)[:, None] & (dims < head_dim)[None, :]
    at = rows.to(tl.int64)[:, None]
    q = tl.load(query + batch * query_batch + head * query_head + at * query_row + dims[None, :], within, other=0.0)
    grad = tl.load(
        grad_output + batch * grad_batch + head * grad_head + at * grad_row + dims[None, :], within, other=0.0
    )
    shift = tl.load(logsumexp + pid * query_length + rows, rows < query_length, other=float("inf")) * before
    minus = tl.load(delta + pid * query_length + rows, rows < query_length, other=0.0)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = key_length
    if is_causal:
        end = tl.minimum(key_length, (block + 1) * BLOCK_M)
    for begin in range(0, end, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        there = (columns < key_length)[:, None] & (dims < head_dim)[None, :]
        column_at = columns.to(tl.int64)[:, None]
        k = tl.load(key + column_at * key_row + dims[None, :], there, other=0.0)
        v = tl.load(value + column_at * value_row + dims[None, :], there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * before)
        seen = (columns < key_length)[None, :] & ((columns[None, :] <= rows[:, None]) | (is_causal == 0))
        weights = tl.where(seen, weights_of(scores, shift[:, None], after), 0.0)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = weights * (grad_weights - minus[:, None])
        sums = tl.dot(grad_scores.to(k.dtype), k, sums, input_precision="ieee")
    to = ((batch * query_length + rows.to(tl.int64)) * heads + head)[:, None] * head_dim + dims[None, :]
    tl.store(grad_query + to, (sums * scale).to(grad_query.dtype.element_ty), within)


# ---- launchers -------------------------------------------------------------------------------------------------


def blocks(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_D, num_warps and num_stages of a kernel for a head_dim and dtype."""
    block_d = max(32, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:  # without tensor cores: small tiles, so that nothing spills
        m, n, warps = (32, 32, 4) if block_d < 128 else (16, 32, 4)
        if kernel == "grad_key_value":
            m, n, warps = (32, 32, 4) if block_d < 128 else (32, 16, 8)
        return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 1}
    m, n, warps = {
        "forward": {32: (128, 64, 4), 64: (128, 64, 4), 128: (128, 64, 8)},
        "grad_key_value": {32: (64, 64, 4), 64: (32, 64, 4), 128: (32, 64, 8)},
        "grad_query": {32: (64, 64, 4), 64: (64, 64, 4), 128: (64, 32, 4)},
        "delta": {32: (64, 0, 4), 64: (64, 0, 4), 128: (64, 0, 4)},
    }[kernel][block_d]
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def heads_strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def forward(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output (B, N, Q, D), laid out as (B, Q, N, D), and logsumexp (B, N, Q) in float32.

    `options` are those of lmengine/ops/attention.py's OPTIONS.
    """
    is_causal, scale = options["window_right"] == 0, options["scale"]
    query, key, value = map(with_contiguous_rows, (query, key, value))
    batch, heads, length, head_dim = query.shape
    output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
    if output.numel() == 0:
        return output, logsumexp
    chosen = blocks("forward", head_dim, query.dtype)
    forward_kernel[(triton.cdiv(length, chosen["BLOCK_M"]) * batch * heads,)](
        query, key, value, output, logsumexp,
        *heads_strides(query), *heads_strides(key), *heads_strides(value), *heads_strides(output),
        heads, length, key.shape[2], head_dim, scale, int(is_causal), **chosen,
    )  # fmt: skip
    return output, logsumexp


def backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, options: dict[str, Any], needs_grad_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, each laid out as (B, length, N, D), and of the mask in float32."""
    is_causal, scale = options["window_right"] == 0, options["scale"]
    grad_mask = logsumexp.new_empty(0)
    query, key, value, output, grad_output = map(with_contiguous_rows, (query, key, value, output, grad_output))
    batch, heads, length, head_dim = query.shape
    keys = key.shape[2]
    grad_query = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    grad_key = query.new_empty(batch, keys, heads, head_dim).transpose(1, 2)
    grad_value = query.new_empty(batch, keys, heads, head_dim).transpose(1, 2)
    if batch * heads * head_dim == 0:
        return grad_query, grad_key, grad_value, grad_mask
    if length == 0 or keys == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), grad_mask
    delta = torch.empty_like(logsumexp)
    block_d = max(32, triton.next_power_of_2(head_dim))
    delta_kernel[(triton.cdiv(length, 64) * batch * heads,)](
        grad_output, output, delta, *heads_strides(grad_output), *heads_strides(output), heads, length, head_dim,
        BLOCK_M=64, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    if grad_logsumexp is not None:
        delta -= grad_logsumexp
    strides = (*heads_strides(query), *heads_strides(key), *heads_strides(value), *heads_strides(grad_output))
    sizes = (heads, length, keys, head_dim, scale, int(is_causal))
    chosen = blocks("grad_key_value", head_dim, query.dtype)
    grad_key_value_kernel[(triton.cdiv(keys, chosen["BLOCK_N"]) * batch * heads,)](
        query, key, value, grad_output, logsumexp, delta, grad_key, grad_value, *strides, *sizes, **chosen
    )
    chosen = blocks("grad_query", head_dim, query.dtype)
    grad_query_kernel[(triton.cdiv(length, chosen["BLOCK_M"]) * batch * heads,)](
        query, key, value, grad_output, logsumexp, delta, grad_query, *strides, *sizes, **chosen
    )
    return grad_query, grad_key, grad_value, grad_mask


# ---- for inspection without a GPU --------------------------------------------------------------------------------


def static_configurations() -> list[StaticConfiguration]:
    """All that may be launched: each kernel for each dtype and padded head_dim."""
    found = []
    kernels = {
        "forward": (forward_kernel, "query key value output", "logsumexp"),
        "grad_key_value": (grad_key_value_kernel, "query key value grad_output grad_key grad_value", "logsumexp delta"),
        "grad_query": (grad_query_kernel, "query key value grad_output grad_query", "logsumexp delta"),
        "delta": (delta_kernel, "grad_output output", "delta"),
    }
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for head_dim in (32, 64, 128):
            for kernel_name, (kernel, same, single) in kernels.items():
                chosen = blocks(kernel_name, head_dim, dtype)
                if kernel_name == "delta":
                    chosen = {"BLOCK_M": 64, "BLOCK_D": chosen["BLOCK_D"], "num_warps": 4, "num_stages": 2}
                constants = {key: size for key, size in chosen.items() if key.startswith("BLOCK")}
                signature = {}
                for argument in kernel.arg_names:
                    if argument in same.split():
                        signature[argument] = f"*{name}"
                    elif argument in single.split():
                        signature[argument] = "*fp32"
                    elif argument == "scale":
                        signature[argument] = "fp32"
                    elif argument not in constants:
                        signature[argument] = "i32"
                strides = {a for a in signature if a.endswith(("_batch", "_head", "_row"))}
                pointers = {a for a, kind in signature.items() if kind.startswith("*")}
                found.append(
                    StaticConfiguration(
                        f"attention {kernel_name} {name} d{head_dim}", kernel, signature, constants,
                        chosen["num_warps"], chosen["num_stages"],
                        frozenset(strides | pointers | {"head_dim"}),
                        matrix_instructions=name != "fp32" and kernel_name != "delta",
                    )
                )  # fmt: skip
    return found
