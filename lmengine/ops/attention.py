"""Softmax attention: softmax(scale * query key^T) value (Vaswani et al. 2017), without the matrix of all scores.

B: batch, N: heads, M: heads of keys and values, Q: query length, K: key length, D: head_dim, E: the values' head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lmengine import backends
from lmengine.backends import Operator
from lmengine.ops.attention_reference import reference


class Options(TypedDict, total=False):
    """The keyword arguments of `attention` but for return_logsumexp."""

    mask: Tensor | None
    window_size: tuple[int, int]
    bottom_right: bool
    prefix_lengths: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    alibi_slopes: Tensor | None
    softcap: float
    dropout_p: float
    seed: Tensor | None
    deterministic: bool


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = ..., scale: float | None = ..., *,
    return_logsumexp: Literal[False] = ..., **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = ..., scale: float | None = ..., *,
    return_logsumexp: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    prefix_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value.

    A score is scale * query key^T, then softcap * tanh(score / softcap), then plus an additive mask, then minus ALiBi's
    slope * distance. Query i has position i, or i + K - Q with `bottom_right`, where Q and K are its sequence's own
    lengths; a causal mask, a window and ALiBi count from it.

    Args:
        query: (B, N, Q, D), any floating dtype of the backend that runs.
        key: (B, M, K, D), the dtype and device of the query; M divides N, and query head n uses head n // (N / M).
        value: (B, M, K, E), likewise.
        is_causal: a query sees the keys at its own position and before.
        scale: 1/sqrt(D) where it is None.
        mask: broadcasts to (B, N, Q, K), four dimensions: bool (True: the query sees the key), or floating, of the
            query's dtype or float32, which is added to the scores and may require a gradient.
        window_size: (left, right): a query at position p sees the keys from p - left to p + right; -1: unlimited.
        bottom_right: count positions so that the last query stands at the last key.
        prefix_lengths: (B,), int32: every query sees the keys before this, whatever window and is_causal say
            (UniLM, Dong et al. 2019).
        key_lengths: (B,), int32: the keys from this on are padding, which no query sees.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32, sums of lengths from 0: the sequences lie one behind the
            other in a batch of 1, (1, N, all queries, D); prefix_lengths, key_lengths and the rows of alibi_slopes
            then count sequences. Excludes mask.
        max_seqlen_q, max_seqlen_k: the longest sequence; found from cu_seqlens where None, which waits for a GPU.
        alibi_slopes: (N,) or (B, N), float32 (Press et al. 2022); has no gradient.
        softcap: 0 for none (Gemma 2).
        dropout_p: the probability that a weight is set to 0; the others are divided by 1 - dropout_p.
        seed: (1,), int64, on the query's device: dropout's mask depends on it and on the places alone, and is the same
            on every backend. Drawn from PyTorch's generator where None.
        deterministic: the backward gives the same bits again; torch.use_deterministic_algorithms asks for it too.
        return_logsumexp: return the logsumexp as well.

    Returns:
        (B, N, Q, E), and with return_logsumexp (B, N, Q) in float32: the natural logarithm of the sum of exp(score),
        differentiable. A query that sees no key gives 0, and -infinity.

        Where a gradient of a gradient is wanted, it is computed by the reference, with all scores in memory.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not go together; the message names the argument.
    """
    if (
        mask is prefix_lengths is key_lengths is cu_seqlens_q is cu_seqlens_k is alibi_slopes is None
        and not (softcap or dropout_p or bottom_right or deterministic)
        and window_size == (-1, -1)
    ):
        found = eager(query, key, value, is_causal, scale)
        if found is not None:
            return found if return_logsumexp else found[0]
    options: dict[str, Any] = {}
    if mask is not None:
        options["mask"] = mask
    if window_size != (-1, -1):
        options["window_size"] = window_size
    if bottom_right:
        options["bottom_right"] = True
    if prefix_lengths is not None:
        options["prefix_lengths"] = prefix_lengths
    if key_lengths is not None:
        options["key_lengths"] = key_lengths
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        options.update(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        options.update(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if softcap:
        options["softcap"] = float(softcap)
    if dropout_p:
        if seed is None:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=query.device)
        options.update(dropout_p=float(dropout_p), seed=seed)
    if deterministic or torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    output, logsumexp = operator(query, key, value, is_causal, scale, **options)
    return (output, logsumexp) if return_logsumexp else output


attention.operator_name = "attention"  # type: ignore[attr-defined]


def check(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None, **options):
    """Raises ValueError or TypeError for what no backend takes."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected (batch, heads, length, head_dim), got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            wanted = query.dtype if query.is_floating_point() else "a floating dtype"
            raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected device {query.device}, got {tensor.device}")
    batch, heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        expected = (batch, kv_heads, length, head_dim)
        raise ValueError(f"key: expected {expected}, got {tuple(key.shape)}")
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: expected a number of heads that divides the query's {heads}, got {kv_heads}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected {(batch, kv_heads, length)} and a head_dim, got {tuple(value.shape)}")
    if options:
        check_options(query, key, **options)


def check_options(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    prefix_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
) -> None:
    batch, heads, length, _ = query.shape
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: expected to be given, as the other cu_seqlens is")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if batch != 1:
            raise ValueError(f"query: expected a batch of 1 with cu_seqlens_q, got {batch}")
        if mask is not None:
            raise ValueError("mask: expected None with cu_seqlens_q")
        batch = cu_seqlens_q.shape[0] - 1
        for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            check_numbers(name, starts, (batch + 1,), torch.int32, query.device)
    for name, lengths in (("prefix_lengths", prefix_lengths), ("key_lengths", key_lengths)):
        if lengths is not None:
            check_numbers(name, lengths, (batch,), torch.int32, query.device)
    if alibi_slopes is not None:
        shape = (batch, heads) if alibi_slopes.dim() == 2 else (heads,)
        check_numbers("alibi_slopes", alibi_slopes, shape, torch.float32, query.device)
    if mask is not None:
        sizes = (batch, heads, length, key.shape[2])
        if mask.dim() != 4 or any(size not in (1, full) for size, full in zip(mask.shape, sizes, strict=True)):
            raise ValueError(f"mask: expected four dimensions that broadcast to {sizes}, got {tuple(mask.shape)}")
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(f"mask: expected bool, float32 or {query.dtype}, got {mask.dtype}")
        if mask.device != query.device:
            raise ValueError(f"mask: expected device {query.device}, got {mask.device}")
    if len(window_size) != 2 or any(side < -1 for side in window_size):
        raise ValueError(f"window_size: expected two numbers from -1 up, got {window_size}")
    if softcap < 0:
        raise ValueError(f"softcap: expected a number from 0 up, got {softcap}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a number from 0 to 1, got {dropout_p}")
    if seed is not None:
        check_numbers("seed", seed, (1,), torch.int64, query.device)


def check_numbers(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


operator = Operator("attention", check)
FLOATING = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take


# ---- what the kernels take -------------------------------------------------------------------------------------

# the arguments of the C++ and Triton operators behind query, key and value, and their places
OPTIONS = (
    "mask", "alibi_slopes", "prefix_lengths", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "seed", "max_seqlen_q",
    "max_seqlen_k", "window_left", "window_right", "bottom_right", "scale", "softcap", "dropout_p", "deterministic",
)  # fmt: skip


def lowered(query: Tensor, key: Tensor, is_causal: bool, scale: float, **options: Any) -> tuple[Any, ...]:
    """The values of OPTIONS for arguments of `attention`, whose check they have passed."""
    left, right = options.get("window_size", (-1, -1))
    if is_causal:
        right = 0
    lengths = [query.shape[2], key.shape[2]]
    for index, side in enumerate("qk"):
        starts = options.get(f"cu_seqlens_{side}")
        if starts is not None:
            longest = options.get(f"max_seqlen_{side}")
            lengths[index] = longest if longest is not None else int(starts.diff().amax()) if len(starts) > 1 else 0
    slopes = options.get("alibi_slopes")
    if slopes is not None:
        slopes = slopes.reshape(-1, query.shape[1]).contiguous()
    small = (options.get(name) for name in OPTIONS[2:7])
    return (
        options.get("mask"), slopes, *(None if t is None else t.contiguous() for t in small), *lengths, left, right,
        options.get("bottom_right", False), scale, options.get("softcap", 0.0), options.get("dropout_p", 0.0),
        options.get("deterministic", False),
    )  # fmt: skip


def unsupported(max_head_dim: float):
    """A backend's check: the dtypes of the kernels, and its largest head_dim. All kernels have all options."""

    def reason(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale=None, **options: Any):
        if query.dtype not in FLOATING:
            return f"query: expected float32, bfloat16 or float16, got {query.dtype}"
        for name, head_dim in (("query", query.shape[3]), ("value", value.shape[3])):
            if not 1 <= head_dim <= max_head_dim:
                return f"{name}: expected a head_dim from 1 to {max_head_dim}, got {head_dim}"
        return None

    return reason


def with_padded_heads(run):
    """A GPU's kernels, which take head_dims from 16 up that 8 divides, for any: zeros behind change no product."""

    def padded(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any):
        head_dim, value_dim = query.shape[3], value.shape[3]
        if head_dim % 8 == 0 and value_dim % 8 == 0 and head_dim >= 16 and value_dim >= 16:
            return run(query, key, value, *args, **options)
        query, key, value = (F.pad(t, (0, max(16, -(-t.shape[3] // 8) * 8) - t.shape[3])) for t in (query, key, value))
        output, logsumexp = run(query, key, value, *args, **options)
        return output[..., :value_dim], logsumexp

    return padded


# ---- CPU and CUDA ----------------------------------------------------------------------------------------------


def compiled(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, **options: Any):
    arguments = lowered(query, key, is_causal, scale, **options)
    return torch.ops.lmengine.attention_forward(query, key, value, *arguments)


def heads_like(tensor: Tensor, heads: int, length: int, dim: int) -> Tensor:
    """(B, heads, length, dim) laid out as (B, length, heads, dim), so that merging the heads copies nothing."""
    return tensor.new_empty(tensor.shape[0], length, heads, dim).transpose(1, 2)


def fake_forward(query, key, value, *options):
    _, heads, length, _ = query.shape
    return heads_like(query, heads, length, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


def fake_backward(grad_output, grad_logsumexp, query, key, value, output, logsumexp, *options):
    mask, needs_grad_mask = options[0], options[len(OPTIONS)]
    grads = (heads_like(tensor, *tensor.shape[1:]) for tensor in (query, key, value))
    return *grads, query.new_empty(mask.shape if needs_grad_mask else (0,), dtype=torch.float32)


def fake_plain_backward(grad_output, query, key, value, *numbers):
    return tuple(heads_like(tensor, *tensor.shape[1:]) for tensor in (query, key, value))


def setup_context(ctx, inputs, output):
    ctx.options = [option if not isinstance(option, Tensor) else None for option in inputs[3:]]
    ctx.save_for_backward(*inputs[:3], *output, *(o for o in inputs[3:10]))
    ctx.set_materialize_grads(False)


def differentiate(backward):
    """The autograd formula around a backend's backward operator."""

    def formula(ctx, grad_output, grad_logsumexp):
        nothing = (None,) * len(OPTIONS)
        if grad_output is None and grad_logsumexp is None:
            return None, None, None, *nothing
        query, key, value, output, logsumexp, *tensors = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        mask = tensors[0]
        needs_grad_mask = mask is not None and ctx.needs_input_grad[3]
        grad_query, grad_key, grad_value, grad_mask = backward(
            grad_output, grad_logsumexp, query, key, value, output, logsumexp, *tensors, *ctx.options[7:],
            needs_grad_mask,
        )  # fmt: skip
        return grad_query, grad_key, grad_value, grad_mask.to(mask.dtype) if needs_grad_mask else None, *nothing[1:]

    return formula


def setup_second_context(ctx, inputs, output):
    ctx.numbers = inputs[14 : len(inputs) - 1]
    ctx.needs_grad_mask = inputs[-1]
    ctx.save_for_backward(*inputs[:5], *inputs[7:14])
    ctx.set_materialize_grads(False)


def differentiate_again(ctx, *grads):
    """The gradient of the backward, by the reference: it is that of a function of grad_output, query, key and value."""
    grad_output, grad_logsumexp, query, key, value, mask, *tensors = ctx.saved_tensors
    options = dict(zip(OPTIONS, (mask, *tensors, *ctx.numbers), strict=True))
    options["window_size"] = (options.pop("window_left"), options.pop("window_right"))

    def followed(tensor):
        # a view, whose gradient does not count what reaches the tensor through another of the inputs
        return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        grad_output, query, key, value = map(followed, (grad_output, query, key, value))
        inputs, weights = [query, key, value], [grad_output]
        if ctx.needs_grad_mask:
            mask = followed(mask)
            inputs.append(mask)
        if grad_logsumexp is not None:
            weights.append(followed(grad_logsumexp))
        outputs = reference(query, key, value, False, **(options | {"mask": mask}))[: len(weights)]
        first = torch.autograd.grad(outputs, inputs, weights, create_graph=True)
        given = [(f, g.to(f.dtype)) for f, g in zip(first, grads, strict=False) if g is not None]
        second = torch.autograd.grad(
            [f for f, _ in given], [*weights, *inputs], [g for _, g in given], create_graph=True, allow_unused=True
        )
    for_query, for_key, for_value, *for_mask = second[len(weights) :]
    return (
        second[0], second[1] if len(weights) > 1 else None, for_query, for_key, for_value, None, None,
        for_mask[0] if for_mask else None, *(None,) * len(OPTIONS),
    )  # fmt: skip


if backends.library() is not None:
    plain_forward = torch.ops.lmengine.attention_plain_forward.default
    plain_backward = torch.ops.lmengine.attention_plain_backward.default
    torch.library.register_fake("lmengine::attention_plain_forward", fake_forward)
    torch.library.register_fake("lmengine::attention_plain_backward", fake_plain_backward)
    torch.library.register_fake("lmengine::attention_forward", fake_forward)
    torch.library.register_fake("lmengine::attention_backward", fake_backward)
    torch.library.register_autograd(
        "lmengine::attention_forward",
        differentiate(lambda *args: torch.ops.lmengine.attention_backward(*args)),
        setup_context=setup_context,
    )
    torch.library.register_autograd(
        "lmengine::attention_backward", differentiate_again, setup_context=setup_second_context
    )

# ---- the short way of an eager call ------------------------------------------------------------------------------


def eager(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None):
    """Output and logsumexp of a plain call by the default backend, or None where the long way has to decide.

    Going through a Python-registered autograd formula and all checks takes ten times as long as a small kernel. The
    checks of the C++ operator come here first; where it refuses, the long way finds out what it was.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    try:
        device = query.device
        if not runs_compiled(device.type, backends._forced) or not device == key.device == value.device:
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return EagerAttention.apply(query, key, value, is_causal, scale)
        return plain_forward(query, key, value, is_causal, scale)
    except (RuntimeError, TypeError, AttributeError):
        return None


@functools.cache
def runs_compiled(device_type: str, forced: str | None) -> bool:
    """Whether the compiled operator is the backend of a device."""
    return device_type in ("cpu", "cuda") and forced in (None, device_type) and not backends.unusable(device_type)


class EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, is_causal, scale):
        output, logsumexp = plain_forward(query, key, value, is_causal, scale)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.set_materialize_grads(False)
        return output, logsumexp

    @staticmethod
    def backward(ctx, grad_output, grad_logsumexp):
        if grad_logsumexp is None and grad_output is not None and not torch.is_grad_enabled():
            deterministic = torch.are_deterministic_algorithms_enabled()
            grads = plain_backward(grad_output, *ctx.saved_tensors, ctx.is_causal, ctx.scale, deterministic)
            return *grads, None, None
        query, key, value, output, logsumexp = ctx.saved_tensors
        if grad_output is None:
            if grad_logsumexp is None:
                return None, None, None, None, None
            grad_output = torch.zeros_like(output)
        options = lowered(query, key, ctx.is_causal, ctx.scale)
        grads = torch.ops.lmengine.attention_backward(
            grad_output, grad_logsumexp, query, key, value, output, logsumexp, *options, False
        )
        return *grads[:3], None, None


# ---- Triton ----------------------------------------------------------------------------------------------------

TENSORS = ", ".join(f"Tensor? {name}" for name in OPTIONS[:7])
NUMBERS = (
    "int max_seqlen_q, int max_seqlen_k, int window_left, int window_right, bool bottom_right, float scale, "
    "float softcap, float dropout_p, bool deterministic"
)


def triton_forward_kernels(query, key, value, *options):
    from lmengine.kernels import attention as kernels

    return kernels.forward(query, key, value, dict(zip(OPTIONS, options, strict=True)))


def triton_backward_kernels(grad_output, grad_logsumexp, query, key, value, output, logsumexp, *options):
    from lmengine.kernels import attention as kernels

    return kernels.backward(
        grad_output, grad_logsumexp, query, key, value, output, logsumexp,
        dict(zip(OPTIONS, options, strict=False)), needs_grad_mask=options[-1],
    )  # fmt: skip


triton_forward = torch.library.custom_op(
    "lmengine::attention_triton_forward",
    triton_forward_kernels,
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {TENSORS}, {NUMBERS}) -> (Tensor, Tensor)",
)
triton_backward = torch.library.custom_op(
    "lmengine::attention_triton_backward",
    triton_backward_kernels,
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor output, Tensor "
    f"logsumexp, {TENSORS}, {NUMBERS}, bool needs_grad_mask) -> (Tensor, Tensor, Tensor, Tensor)",
)
triton_forward.register_fake(fake_forward)
triton_backward.register_fake(fake_backward)
triton_backward.register_autograd(differentiate_again, setup_context=setup_second_context)
triton_forward.register_autograd(differentiate(triton_backward), setup_context=setup_context)


def triton_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, **options: Any):
    return triton_forward(query, key, value, *lowered(query, key, is_causal, scale, **options))


# ---- the backends ----------------------------------------------------------------------------------------------

operator.register("cuda", with_padded_heads(compiled), unsupported(256))
operator.register("triton", with_padded_heads(triton_attention), unsupported(256))
operator.register("cpu", compiled, unsupported(math.inf))
operator.register("reference", reference, lambda *args, **kwargs: None)
