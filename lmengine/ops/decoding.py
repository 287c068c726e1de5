"""Decoding: attention of one or a few new queries a sequence against a cache of its keys and values.

B: batch, N: heads, M: heads of keys and values, Q: queries a sequence, K: keys that a cache has room for, D: head_dim,
E: the values' head_dim, R: rotary_dim, the leading dimensions of D that rotate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmengine import backends
from lmengine.backends import Operator
from lmengine.ops.attention import FLOATING, check_numbers, runs_compiled
from lmengine.ops.decoding_reference import reference

MAX_HEAD_DIM_GPU = 256


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last Q tokens of each sequence, whose keys and values lie in a cache.

    A sequence's length is cache_lengths, plus the new keys where they are given. Its queries are its last tokens: query
    i has position length - Q + i and sees the keys up to there. New keys and values are written into the cache, in
    place, behind those that it has; cache_lengths is not changed. Keys rotate before that and queries before the
    product, each by its position (Su et al. 2021); what the cache already holds is taken as it is.

    The keys are split between threads or blocks of threads, and the parts combined in a fixed order (as in
    Flash-Decoding, Dao et al. 2023). How many keys a part has depends on the sequence's own length, on M and on
    num_splits alone: a batch gives the same bits as its sequences one by one.

    Args:
        query: (B, N, Q, D), any floating dtype of the backend that runs.
        key_cache: (B, M, K, D), or with block_table (blocks, page_size, M, D); the dtype and device of the query. M
            divides N, and query head n uses head n // (N / M). Any strides but for the last, which is 1.
        value_cache: (B, M, K, E), or with block_table (blocks, page_size, M, E); likewise.
        cache_lengths: (B,), int32: how many keys of each sequence the cache holds before this call.
        key, value: (B, M, Q, D) and (B, M, Q, E), both or neither: the queries' own keys and values, to be appended.
        block_table: (B, max_blocks), int32: key j of sequence b is in row j % page_size of block
            block_table[b, j // page_size]. Entries of blocks that hold no key a query sees are not looked at.
        rotary_cos, rotary_sin: (positions, R / 2), float32 or the query's dtype, both or neither.
        rotary_interleaved: dimensions 2j and 2j + 1 rotate together (GPT-J), not j and j + R / 2 (GPT-NeoX).
        scale: 1/sqrt(D) where it is None.
        window_size: (left, right): a query at position p sees the keys from p - left; -1: unlimited. Those behind it
            it never sees, whatever `right` is.
        softcap: scores become softcap * tanh(score / softcap); 0 for none (Gemma 2).
        alibi_slopes: (N,) or (B, N), float32 (Press et al. 2022): slope * distance is taken off a score.
        num_splits: into how many parts the keys of a sequence are cut at most; 0: chosen by its length.
        return_logsumexp: return the logsumexp as well.

    Returns:
        (B, N, Q, E), and with return_logsumexp (B, N, Q) in float32: the natural logarithm of the sum of exp(score). A
        query that sees no key gives 0, and -infinity.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not go together, a tensor requires a gradient, or, on the
            CPU, a length does not fit the cache or a block number is out of range; the message names the argument. On a
            GPU that would take waiting for it: there, keys that do not fit are neither written nor read, and a block
            number that is out of range stands for keys that no query sees.
    """
    found = eager(
        query, key_cache, value_cache, cache_lengths, key, value, block_table, rotary_cos, rotary_sin, alibi_slopes,
        rotary_interleaved, scale, window_size, softcap, num_splits,
    )  # fmt: skip
    if found is not None:
        return found if return_logsumexp else found[0]
    options: dict[str, Any] = {}
    if key is not None or value is not None:
        options.update(key=key, value=value)
    if block_table is not None:
        options["block_table"] = block_table
    if rotary_cos is not None or rotary_sin is not None:
        options.update(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved)
    if window_size[0] >= 0 or min(window_size) < -1 or len(window_size) != 2:
        options["window_size"] = window_size
    if softcap:
        options["softcap"] = float(softcap)
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if num_splits:
        options["num_splits"] = num_splits
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    output, logsumexp = operator(query, key_cache, value_cache, cache_lengths, scale, **options)
    return (output, logsumexp) if return_logsumexp else output


attention_decode.operator_name = "attention_decode"  # type: ignore[attr-defined]


def check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    scale: float | None = None,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_logsumexp: bool = False,
) -> None:
    """Raises ValueError or TypeError for what no backend takes."""
    check_like_query("query", query, query)
    batch, heads, length, head_dim = query.shape
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_like_query(name, tensor, query)
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(f"{name}: expected a last dimension of stride 1, got strides {tensor.stride()}")
    head_axis = 1 if block_table is None else 2
    kv_heads, value_dim = key_cache.shape[head_axis], value_cache.shape[3]
    if key_cache.shape[3] != head_dim or (block_table is None and key_cache.shape[0] != batch):
        expected = f"({batch if block_table is None else 'blocks'}, ..., {head_dim})"
        raise ValueError(f"key_cache: expected {expected}, got {tuple(key_cache.shape)}")
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key_cache: expected a number of heads that divides the query's {heads}, got {kv_heads}")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        expected = f"{tuple(key_cache.shape[:3])} and a head_dim"
        raise ValueError(f"value_cache: expected {expected}, got {tuple(value_cache.shape)}")
    if not isinstance(cache_lengths, Tensor):
        raise TypeError(f"cache_lengths: expected a tensor, got {type(cache_lengths).__name__}")
    check_numbers("cache_lengths", cache_lengths, (batch,), torch.int32, query.device)
    if (key is None) != (value is None):
        raise ValueError(f"{'key' if key is None else 'value'}: expected to be given, as the other of the two is")
    if key is not None and value is not None:
        for name, tensor, dim in (("key", key, head_dim), ("value", value, value_dim)):
            check_like_query(name, tensor, query)
            if tuple(tensor.shape) != (batch, kv_heads, length, dim):
                raise ValueError(f"{name}: expected {(batch, kv_heads, length, dim)}, got {tuple(tensor.shape)}")
    if block_table is not None:
        if block_table.dim() != 2:
            raise ValueError(f"block_table: expected (batch, max_blocks), got {tuple(block_table.shape)}")
        check_numbers("block_table", block_table, (batch, block_table.shape[1]), torch.int32, query.device)
    if (rotary_cos is None) != (rotary_sin is None):
        missing = "rotary_cos" if rotary_cos is None else "rotary_sin"
        raise ValueError(f"{missing}: expected to be given, as the other of the two is")
    if rotary_cos is not None and rotary_sin is not None:
        check_rotary(query, rotary_cos, rotary_sin)
    if alibi_slopes is not None:
        shape = (batch, heads) if alibi_slopes.dim() == 2 else (heads,)
        check_numbers("alibi_slopes", alibi_slopes, shape, torch.float32, query.device)
    if len(window_size) != 2 or any(side < -1 for side in window_size):
        raise ValueError(f"window_size: expected two numbers from -1 up, got {window_size}")
    if softcap < 0:
        raise ValueError(f"softcap: expected a number from 0 up, got {softcap}")
    if num_splits < 0:
        raise ValueError(f"num_splits: expected a number from 0 up, got {num_splits}")
    if torch.is_grad_enabled():
        given = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "key": key, "value": value}
        for name, optional in (given | {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}).items():
            if optional is not None and optional.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that requires no gradient, as attention_decode has none: "
                    "call it under torch.no_grad(), or use attention"
                )


def check_like_query(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected four dimensions, got {tuple(tensor.shape)}")
    if tensor.dtype != query.dtype or not tensor.is_floating_point():
        wanted = query.dtype if query.is_floating_point() else "a floating dtype"
        raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected device {query.device}, got {tensor.device}")


def check_rotary(query: Tensor, rotary_cos: Tensor, rotary_sin: Tensor) -> None:
    if rotary_cos.dim() != 2 or 2 * rotary_cos.shape[1] > query.shape[3]:
        expected = f"(positions, rotary_dim / 2) with a rotary_dim up to {query.shape[3]}"
        raise ValueError(f"rotary_cos: expected {expected}, got {tuple(rotary_cos.shape)}")
    if rotary_cos.dtype not in (torch.float32, query.dtype):
        raise TypeError(f"rotary_cos: expected float32 or {query.dtype}, got {rotary_cos.dtype}")
    check_numbers("rotary_cos", rotary_cos, tuple(rotary_cos.shape), rotary_cos.dtype, query.device)
    check_numbers("rotary_sin", rotary_sin, tuple(rotary_cos.shape), rotary_cos.dtype, query.device)


operator = Operator("attention_decode", check)

# ---- what the kernels take -------------------------------------------------------------------------------------

# the arguments of the C++ and Triton operators behind query, key_cache, value_cache and cache_lengths
ARGUMENTS = (
    "key", "value", "block_table", "rotary_cos", "rotary_sin", "alibi_slopes", "rotary_interleaved", "scale",
    "window_left", "softcap", "num_splits",
)  # fmt: skip


def lowered(query: Tensor, scale: float, **options: Any) -> tuple[Any, ...]:
    """The values of ARGUMENTS for arguments of `attention_decode`, whose check they have passed."""
    slopes = options.get("alibi_slopes")
    if slopes is not None:
        slopes = slopes.reshape(-1, query.shape[1]).contiguous()
    small = (options.get(name) for name in ("block_table", "rotary_cos", "rotary_sin"))
    return (
        options.get("key"), options.get("value"), *(None if t is None else t.contiguous() for t in small), slopes,
        options.get("rotary_interleaved", False), scale, options.get("window_size", (-1, -1))[0],
        options.get("softcap", 0.0), options.get("num_splits", 0),
    )  # fmt: skip


def fake_decode(query, key_cache, value_cache, cache_lengths, *arguments):
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value_cache.shape[3]).transpose(1, 2)
    return output, query.new_empty(batch, heads, length, dtype=torch.float32)


def unsupported_on_cpu(query: Tensor, *args: Any, **options: Any) -> str | None:
    return unsupported_dtype(query)


def unsupported_on_gpu(query: Tensor, key_cache: Tensor, value_cache: Tensor, *args: Any, **options: Any) -> str | None:
    for name, tensor in (("query", query), ("value_cache", value_cache)):
        if not 8 <= tensor.shape[3] <= MAX_HEAD_DIM_GPU or tensor.shape[3] % 8:
            return f"{name}: expected a head_dim from 8 to 256 that 8 divides, got {tensor.shape[3]}"
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        if any(size > 1 and stride % 8 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)):
            return f"{name}: expected strides that 8 divides, got {tensor.stride()}"
    return unsupported_dtype(query)


def unsupported_dtype(query: Tensor) -> str | None:
    if query.dtype not in FLOATING:
        return f"query: expected float32, bfloat16 or float16, got {query.dtype}"
    return None


# ---- CPU and CUDA ----------------------------------------------------------------------------------------------


def compiled(query, key_cache, value_cache, cache_lengths, scale, **options: Any):
    return torch.ops.lmengine.attention_decode(
        query, key_cache, value_cache, cache_lengths.contiguous(), *lowered(query, scale, **options)
    )


if backends.library() is not None:
    torch.library.register_fake("lmengine::attention_decode", fake_decode)

# ---- the short way of an eager call ------------------------------------------------------------------------------


def eager(query, key_cache, value_cache, cache_lengths, *arguments) -> tuple[Tensor, Tensor] | None:
    """Output and logsumexp by the default backend, or None where the long way has to decide, as attention.eager does.

    The checks of the C++ operator come before it writes; where it refuses, the long way finds out what it was.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    *tensors, rotary_interleaved, scale, window_size, softcap, num_splits = arguments
    try:
        if not runs_compiled(query.device.type, backends._forced):
            return None
        if torch.is_grad_enabled():
            for tensor in (query, key_cache, value_cache, *tensors):
                if tensor is not None and tensor.requires_grad:
                    return None
        left, right = window_size
        if left < -1 or right < -1 or softcap < 0:
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.lmengine.attention_decode.default(
            query, key_cache, value_cache, cache_lengths, *tensors, rotary_interleaved, scale, left, softcap, num_splits
        )
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


# ---- Triton ----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "lmengine::attention_decode_triton",
    mutates_args=("key_cache", "value_cache"),
    schema="(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_lengths, Tensor? key, "
    "Tensor? value, Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? alibi_slopes, "
    "bool rotary_interleaved, float scale, int window_left, float softcap, int num_splits) -> (Tensor, Tensor)",
)
def triton_kernels(query, key_cache, value_cache, cache_lengths, *arguments):
    from lmengine.kernels import decoding as kernels

    return kernels.decode(query, key_cache, value_cache, cache_lengths, dict(zip(ARGUMENTS, arguments, strict=True)))


triton_kernels.register_fake(fake_decode)


def triton_decode(query, key_cache, value_cache, cache_lengths, scale, **options: Any):
    arguments = lowered(query, scale, **options)
    return triton_kernels(query, key_cache, value_cache, cache_lengths.contiguous(), *arguments)


operator.register("cuda", compiled, unsupported_on_gpu)
operator.register("triton", triton_decode, unsupported_on_gpu)
operator.register("cpu", compiled, unsupported_on_cpu)
operator.register("reference", reference, lambda *args, **kwargs: None)
