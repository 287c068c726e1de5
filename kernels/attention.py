"""Softmax attention in Triton: the forward kernel, and the launchers of it and of the backward's kernels.

B: batch, N: heads, M: heads of keys and values, Q: query length, K: key length, D: head_dim, E: the values' head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from lmengine.kernels.attention_backward import delta_kernel, grad_key_value_kernel, grad_query_kernel
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
    scores_of,
    sees,
    sequence_of,
    singles_of,
    store_rows,
    weights_of,
)
from lmengine.kernels.attention_tiles import tiles
from lmengine.kernels.configuration import StaticConfiguration
from lmengine.kernels.launch import Launch
from torch import Tensor

# ---- forward ---------------------------------------------------------------------------------------------------


@triton.jit
def add_keys(
    block, first, batch, head, largest, total, sums, q, key, value, key_row, value_row, limits, masking, scoring,
    dropping, BEFORE: tl.constexpr, AFTER: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr,
    TMA: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running maximum, sum of weights and sum of weighted values of queries from `first`."""
    begin = block * BLOCK_N
    count = limits[1] - begin
    k = load_block(key, key_row, batch, head, begin, count, BLOCK_N, HEAD_DIM, BLOCK_D, ALIGN, FULL, TMA)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if FULL:
        scores = scores * (scoring[0] * BEFORE)
    else:
        i = tl.arange(0, BLOCK_M)[:, None]
        j = tl.arange(0, BLOCK_N)[None, :]
        marks = load_mask(i, j, first, begin, limits, masking)
        scores, _ = scores_of(scores, first + i, begin + j, marks, limits, masking, scoring, BEFORE)
        scores = tl.where(sees(first + i, begin + j, marks, limits, masking), scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(now == float("-inf"), 0.0, now)
    weights = weights_of(scores, shift[:, None], AFTER)
    factor = weights_of(largest, shift, AFTER)
    total = total * factor + tl.sum(weights, 1)
    if dropping[0] is not None:
        weights = tl.where(kept_by_dropout(first, begin, dropping, BLOCK_M, BLOCK_N), weights, 0.0)
    v = load_block(value, value_row, batch, head, begin, count, BLOCK_N, VALUE_DIM, BLOCK_E, ALIGN, FULL, TMA)
    sums = tl.dot(weights.to(v.dtype), v, sums * factor[:, None], input_precision="ieee")
    return now, total, sums


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    query, key, value, output, logsumexp, mask, alibi_slopes, prefix_lengths, key_lengths, cu_query, cu_key, seed,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, mask_batch, mask_head, mask_row, mask_column, slopes_batch,
    heads, groups, query_length, key_length, query_rows, left, right, scale, softcap, threshold, dropout_factor,
    BOTTOM_RIGHT: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Output (B, N, Q, E) and logsumexp (B, N, Q), natural: a program has BLOCK_M queries of a head.

    Strides are in elements, the last dimension is contiguous. With TMA key and value are tensor descriptors.
    """
    # 16-bit types take the factor log2(e) into the scale. float32 multiplies the small difference by it, because the
    # roundings of scores and logsumexp in two units would be the largest error of the backward.
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
    rows = query_begin + first
    query += offset_of(batch, query_batch, head, query_head, rows, query_row, ALIGN)
    if not TMA:
        key += offset_of(batch, key_batch, head // groups, key_head, key_begin, key_row, ALIGN)
        value += offset_of(batch, value_batch, head // groups, value_head, key_begin, value_row, ALIGN)
    q = load_rows(query, query_row, count, BLOCK_M, HEAD_DIM, BLOCK_D, ALIGN, False)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    whole, partly, begin, full_begin, full_end, end = key_blocks_of(first, limits, SPLIT, BLOCK_M, BLOCK_N)
    if SPLIT:
        for n in range(0, whole + full_end - full_begin):
            largest, total, sums = add_keys(
                tl.where(n < whole, n, full_begin + n - whole), first, batch, head // groups, largest, total, sums, q,
                key, value, key_row, value_row, limits, masking, scoring, dropping, before, after, HEAD_DIM, VALUE_DIM,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, ALIGN, TMA, True,
            )  # fmt: skip
    partly -= whole
    for n in range(0, partly + full_begin - begin + end - full_end):
        largest, total, sums = add_keys(
            tl.where(n < partly, whole + n, one_of(n - partly, begin, full_begin, full_end)), first, batch,
            head // groups, largest, total, sums, q, key, value, key_row, value_row, limits, masking, scoring, dropping,
            before, after, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, ALIGN, TMA, False,
        )  # fmt: skip
    # a query that sees no key: 0, and -infinity
    divisor = tl.where(total == 0, 1.0, total)
    if seed is not None:
        sums *= dropout_factor
    sums = tl.where((total == 0)[:, None], 0.0, sums / divisor[:, None])
    output += offset_of(batch, output_batch, head, output_head, rows, output_row, ALIGN)
    store_rows(output, output_row, count, sums, BLOCK_M, VALUE_DIM, BLOCK_E, ALIGN)
    natural = tl.where(total == 0, float("-inf"), largest / before + tl.log(divisor))
    logsumexp += singles_of(batch, head, heads, query_rows, cu_query) + rows
    tl.store(logsumexp + tl.arange(0, BLOCK_M), natural, tl.arange(0, BLOCK_M) < count)


# ---- launchers -------------------------------------------------------------------------------------------------


def forward(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output (B, N, Q, E), laid out as (B, Q, N, E), and logsumexp (B, N, Q) in float32.

    `options` are those of lmengine/ops/attention.py's OPTIONS.
    """
    query, key, value = map(with_plain_rows, (query, key, value))
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
    if sequences_of(query, options) == 0 or options["max_seqlen_q"] == 0:
        return output.zero_(), logsumexp.fill_(-torch.inf)
    if output.numel() or logsumexp.numel():
        forward_launch(query, key, value, output, logsumexp, options, architecture_of(query)).run()
    return output, logsumexp


def forward_launch(query, key, value, output, logsumexp, options, architecture) -> Launch:
    arguments = {
        "query": query, "key": key, "value": value, "output": output, "logsumexp": logsumexp,
        **strides(options["cu_seqlens_q"] is not None, query=query, key=key, value=value, output=output),
        **common(query, key, value, options), "ALIGN": alignment(query, key, value, output),
    }  # fmt: skip
    arguments["TMA"] = described(architecture, arguments, "key", "value")
    return Launch(
        forward_kernel, options["max_seqlen_q"], "BLOCK_M", sequences_of(query, options) * query.shape[1], arguments,
        tiles("forward", arguments), {"key": "BLOCK_N BLOCK_D", "value": "BLOCK_N BLOCK_E"},
    )  # fmt: skip


def backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, options: dict[str, Any], needs_grad_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, each laid out as (B, length, heads, dim), and of the mask in float32.

    A deterministic gradient of a mask that broadcasts takes the memory of one that does not.
    """
    query, key, value, output, grad_output = map(with_plain_rows, (query, key, value, output, grad_output))
    grad_query, grad_key, grad_value = (
        tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
        for tensor in (query, key, value)
    )
    mask = options["mask"]
    sizes: tuple[int, ...] = (0,)
    if needs_grad_mask:
        full = (*query.shape[:3], key.shape[2])
        sizes = full if options["deterministic"] else tuple(mask.shape)
    grad_mask = logsumexp.new_zeros(sizes)
    if sequences_of(query, options) == 0 or options["max_seqlen_q"] == 0 or options["max_seqlen_k"] == 0:
        for grad in (grad_query, grad_key, grad_value):
            grad.zero_()
    elif query.shape[1]:
        delta = torch.empty_like(logsumexp)
        delta_launch(grad_output, output, delta, options).run()
        if grad_logsumexp is not None:
            delta -= grad_logsumexp
        for launch in backward_launches(
            grad_output, query, key, value, logsumexp, delta, options, grad_query, grad_key, grad_value,
            grad_mask if needs_grad_mask else None, architecture_of(query),
        ):  # fmt: skip
            launch.run()
    else:
        grad_key.zero_(), grad_value.zero_()
    if needs_grad_mask and grad_mask.shape != mask.shape:
        grad_mask = grad_mask.sum_to_size(mask.shape)
    return grad_query, grad_key, grad_value, grad_mask


def delta_launch(grad_output, output, delta, options) -> Launch:
    arguments = {
        "grad_output": grad_output, "output": output, "delta": delta, **strides(False, grad=grad_output, output=output),
        "heads": output.shape[1], "query_length": output.shape[2], "VALUE_DIM": output.shape[3],
        "ALIGN": alignment(grad_output, output),
    }  # fmt: skip
    return Launch(
        delta_kernel, output.shape[2], "BLOCK_M", output.shape[0] * output.shape[1], arguments,
        tiles("delta", arguments), {},
    )  # fmt: skip


def backward_launches(
    grad_output,
    query,
    key,
    value,
    logsumexp,
    delta,
    options,
    grad_query,
    grad_key,
    grad_value,
    grad_mask,
    architecture,
) -> list[Launch]:
    packed = options["cu_seqlens_q"] is not None
    given = {
        "query": query, "key": key, "value": value, "grad_output": grad_output, "logsumexp": logsumexp, "delta": delta,
        **strides(packed, query=query, key=key, value=value, grad=grad_output), **common(query, key, value, options),
        "ALIGN": alignment(query, key, value, grad_output),
    }  # fmt: skip
    for_keys = given | {"grad_key": grad_key, "grad_value": grad_value}
    for_keys |= strides(packed, grad_key=grad_key, grad_value=grad_value)
    for_queries = given | {"grad_query": grad_query, **strides(packed, grad_query=grad_query), "grad_mask": grad_mask}
    for_queries |= mask_strides("grad_mask", grad_mask)
    for_queries["GRAD_MASK"] = "none"
    if grad_mask is not None:
        full = grad_mask.shape == (*query.shape[:3], key.shape[2])
        for_queries["GRAD_MASK"] = "store" if full else "sums" if grad_mask.shape[2] == 1 else "add"
    for_keys["TMA"] = described(architecture, given, "query", "grad_output")
    for_queries["TMA"] = described(architecture, given, "key", "value")
    sequences = sequences_of(query, options)
    return [
        Launch(
            grad_key_value_kernel, options["max_seqlen_k"], "BLOCK_N", sequences * key.shape[1], for_keys,
            tiles("grad_key_value", for_keys), {"query": "BLOCK_M BLOCK_D", "grad_output": "BLOCK_M BLOCK_E"},
        ),
        Launch(
            grad_query_kernel, options["max_seqlen_q"], "BLOCK_M", sequences * query.shape[1], for_queries,
            tiles("grad_query", for_queries), {"key": "BLOCK_N BLOCK_D", "value": "BLOCK_N BLOCK_E"},
            again=for_queries["GRAD_MASK"] in ("none", "store"),
        ),
    ]  # fmt: skip


# ---- arguments -------------------------------------------------------------------------------------------------


def with_plain_rows(tensor: Tensor) -> Tensor:
    """A tensor whose rows are contiguous and so close that a block's offsets have 32 bits."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) < 2**23 else tensor.contiguous()


def sequences_of(query: Tensor, options: dict[str, Any]) -> int:
    starts = options["cu_seqlens_q"]
    return query.shape[0] if starts is None else starts.shape[0] - 1


def strides(packed: bool, **tensors: Tensor) -> dict[str, int]:
    """The strides of batch, head and row by the kernels' names; that of the batch is 0 where sequences are packed."""
    found = {}
    for name, tensor in tensors.items():
        batch, head, row = (tensor.stride(d) if tensor.shape[d] > 1 else 0 for d in range(3))
        found |= {f"{name}_batch": 0 if packed else batch, f"{name}_head": head, f"{name}_row": row}
    return found


def with_near_rows(mask: Tensor) -> Tensor:
    """A mask so small between its rows and columns that a block's offsets have 32 bits."""
    if max(mask.stride(2), mask.stride(3)) >= 2**23:
        mask = mask.contiguous()
    if mask.stride(2) >= 2**23:
        raise ValueError(f"mask: expected fewer than 2^23 keys in the Triton kernels, got {mask.shape[3]}")
    return mask


def mask_strides(name: str, mask: Tensor | None) -> dict[str, int | None]:
    names = [f"{name}_{dimension}" for dimension in ("batch", "head", "row", "column")]
    if mask is None:
        return dict.fromkeys(names)
    return {n: mask.stride(d) if mask.shape[d] > 1 else 0 for d, n in enumerate(names)}


def alignment(*tensors: Tensor) -> int:
    """How many elements of 16 bytes in all begin the rows at multiples of: 1 where some row does not."""
    step = 16 // tensors[0].element_size()
    return step if all(t.shape[d] == 1 or t.stride(d) % step == 0 for t in tensors for d in range(3)) else 1


def architecture_of(tensor: Tensor) -> int:
    """90 for GPUs that load blocks by tensor descriptors (the tensor memory accelerator), 80 for others."""
    return 90 if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0) else 80


def described(architecture: int, arguments: dict[str, Any], *names: str) -> bool:
    """Whether the tensors of these names are loaded by descriptors: for calls without masks and the like, where nothing
    but the tensor's end ends a sequence, and rows that begin at multiples of 16 bytes."""
    tensors = [arguments[name] for name in names]
    plain = arguments["SPLIT"] and arguments["cu_query"] is None and arguments["key_lengths"] is None
    aligned = alignment(*tensors) > 1 and all(
        (t.is_meta or t.data_ptr() % 16 == 0) and all(t.stride(d) or t.shape[d] == 1 for d in range(3)) for t in tensors
    )
    return architecture >= 90 and plain and aligned and tensors[0].dtype != torch.float32


def common(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the forward and the backward's kernels share; None for what a call lacks."""
    lengths = options["max_seqlen_q"], options["max_seqlen_k"]
    left, right = (
        None if side < 0 else min(side, sum(lengths)) for side in (options["window_left"], options["window_right"])
    )
    mask, slopes, dropout_p = options["mask"], options["alibi_slopes"], options["dropout_p"]
    if mask is not None:
        mask = with_near_rows(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
    found = {
        "mask": mask, **mask_strides("mask", mask), "alibi_slopes": slopes,
        "slopes_batch": None if slopes is None else slopes.stride(0) if slopes.shape[0] > 1 else 0,
        "prefix_lengths": None if left is None and right is None else options["prefix_lengths"],
        "key_lengths": options["key_lengths"], "cu_query": options["cu_seqlens_q"], "cu_key": options["cu_seqlens_k"],
        "heads": query.shape[1], "groups": query.shape[1] // max(key.shape[1], 1), "query_length": lengths[0],
        "key_length": lengths[1], "query_rows": query.shape[2], "left": left, "right": right,
        "scale": float(options["scale"]), "softcap": float(options["softcap"]) or None, "seed": None,
        "threshold": None, "dropout_factor": None, "BOTTOM_RIGHT": bool(options["bottom_right"]),
        "HEAD_DIM": query.shape[3], "VALUE_DIM": value.shape[3],
    }  # fmt: skip
    if dropout_p:
        threshold = min(int(dropout_p * 2**32), 2**32 - 1)
        found["seed"] = options["seed"]
        found["threshold"] = threshold - 2**32 if threshold >= 2**31 else threshold  # the same bits as 32 with a sign
        found["dropout_factor"] = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    # two loops, of which one compares no columns; long float32 rows leave no registers for it
    long = query.dtype == torch.float32 and max(query.shape[3], value.shape[3]) > 128
    found["SPLIT"] = not long and all(found[name] is None for name in ("mask", "alibi_slopes", "softcap", "seed"))
    return found


# ---- for inspection without a GPU --------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"window_right": 0},
    "window": {
        "window_left": 100, "window_right": 0, "bottom_right": True, "prefix_lengths": torch.int32,
        "key_lengths": torch.int32, "cu_seqlens_q": torch.int32, "cu_seqlens_k": torch.int32,
    },
    "ALiBi": {"window_right": 0, "alibi_slopes": torch.float32},
    "softcap": {"window_left": 100, "window_right": 0, "softcap": 50.0},
    "dropout": {"window_right": 0, "dropout_p": 0.1, "seed": torch.int64},
    "boolean": {"mask": torch.bool, "dropout_p": 0.1, "seed": torch.int64},
    "additive": {"mask": torch.float32, "needs_grad_mask": True},
    "everything": {
        "window_left": 100, "window_right": 0, "prefix_lengths": torch.int32, "key_lengths": torch.int32,
        "mask": torch.float32, "alibi_slopes": torch.float32, "softcap": 30.0, "dropout_p": 0.1, "seed": torch.int64,
        "groups": 4, "needs_grad_mask": True,
    },
}  # fmt: skip


def launches(
    kind: dict[str, Any], head_dim: int, dtype: torch.dtype, architecture: int, length: int = 1000, device: str = "meta"
) -> dict[str, Launch]:
    """The launches of a kind of call, by kernel, on tensors that hold nothing."""
    batch, heads, groups = 2, 8, kind.get("groups", 1)

    def empty(*sizes, dtype=dtype):
        return torch.empty(sizes, dtype=dtype, device=device)

    packed = "cu_seqlens_q" in kind
    query, output = (empty(1 if packed else batch, length, heads, head_dim).transpose(1, 2) for _ in range(2))
    key = empty(query.shape[0], length, heads // groups, head_dim).transpose(1, 2)
    logsumexp = empty(*query.shape[:3], dtype=torch.float32)
    options = dict.fromkeys(("mask", "alibi_slopes", "prefix_lengths", "key_lengths", "cu_seqlens_q", "cu_seqlens_k",
                             "seed"))  # fmt: skip
    options |= {"max_seqlen_q": length, "max_seqlen_k": length, "window_left": -1, "window_right": -1, "scale": 0.1}
    options |= {"bottom_right": False, "softcap": 0.0, "dropout_p": 0.0, "deterministic": False}
    sizes = {"mask": (1, heads, length, length), "alibi_slopes": (1, heads), "seed": (1,)}
    for name, value in kind.items():
        if isinstance(value, torch.dtype):
            value = empty(*sizes.get(name, (batch + 1 if name.startswith("cu") else batch,)), dtype=value)
        options[name] = value
    grad_mask = empty(1, heads, length, length, dtype=torch.float32) if kind.get("needs_grad_mask") else None
    for_keys, for_queries = backward_launches(
        output, query, key, key, logsumexp, logsumexp, options, query, key, key, grad_mask, architecture
    )
    return {
        "forward": forward_launch(query, key, key, output, logsumexp, options, architecture),
        "delta": delta_launch(output, output, logsumexp, options),
        "grad_key_value": for_keys, "grad_query": for_queries,
    }  # fmt: skip


def static_configurations() -> list[StaticConfiguration]:
    """Each kernel for each dtype, padded head_dim, kind of call and tile; on sm_90 also with tensor descriptors.

    What float16 compiles to differs from bfloat16 in the type of a few instructions: some kinds stand for all.
    """
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for head_dim in (32, 64, 128, 256):
            kinds = ("full", "causal", "everything") if dtype == torch.float16 else KINDS
            for kind, tma in ((kind, tma) for kind in kinds for tma in (False, True)):
                for kernel, launch in launches(KINDS[kind], head_dim, dtype, 90 if tma else 80).items():
                    if launch.arguments.get("TMA", False) != tma or (kernel == "delta" and kind != "full"):
                        continue
                    for number, configuration in enumerate(launch.configurations):
                        title = f"attention {kernel} {name} d{head_dim} {kind}{' TMA' if tma else ''} {number}"
                        described = launch.described(title, configuration, dtype != torch.float32 and kernel != "delta")
                        quick = dtype == torch.bfloat16 and head_dim in (64, 256) and kind in ("causal", "everything")
                        quick = quick or (dtype == torch.float32 and head_dim == 128 and kind == "everything")
                        found.append(replace(described, architectures=(90,) if tma else (80, 90), quick=quick))
    return found
