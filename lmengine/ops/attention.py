"""Softmax attention: softmax(scale * query key^T) value (Vaswani et al. 2017), without the matrix of all scores.

B: batch, N: heads, Q: query length, K: key length, D: head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmengine import backends
from lmengine.backends import Operator

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128


def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(scale * query key^T) value.

    Args:
        query: (B, N, Q, D), any floating dtype of the backend that runs; D from 16 to 128 for the kernels.
        key: (B, N, K, D), the dtype and device of the query.
        value: (B, N, K, D), likewise.
        is_causal: a query sees the keys at its own position and before, both counted from the start.
        scale: 1/sqrt(D) where it is None.

    Returns:
        (B, N, Q, D). A query that sees no key (K = 0) gives 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not go together; the message names the argument.
    """
    return operator(query, key, value, is_causal, query.shape[-1] ** -0.5 if scale is None else float(scale))


attention.operator_name = "attention"  # type: ignore[attr-defined]


def check(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None) -> None:
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
    expected = (batch, heads, key.shape[2], head_dim)
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")


operator = Operator("attention", check)


# ---- reference -------------------------------------------------------------------------------------------------


def reference(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """The definition of right, with all scores in memory."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key.shape[2] == 0:
        return query * 0
    scores = scale * query @ key.transpose(-1, -2)  # (B, N, Q, K)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


# ---- CPU and CUDA ----------------------------------------------------------------------------------------------


def compiled(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    return torch.ops.lmengine.attention_forward(query, key, value, is_causal, scale)[0]


def unsupported(dtypes: tuple[torch.dtype, ...]):
    """A backend's check: its dtypes, and the range of head_dim that all kernels have."""

    def reason(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None):
        if query.dtype not in dtypes:
            return f"query: expected {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {query.dtype}"
        head_dim = query.shape[-1]
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
            return f"query: expected a head_dim from 16 to 128 that 8 divides, got {head_dim}"
        return None

    return reason


def heads_like(tensor: Tensor, length: int) -> Tensor:
    """(B, N, length, D) laid out as (B, length, N, D), so that merging the heads copies nothing."""
    batch, heads, _, head_dim = tensor.shape
    return tensor.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def fake_forward(query, key, value, is_causal, scale):
    return heads_like(query, query.shape[2]), query.new_empty(query.shape[:3], dtype=torch.float32)


def fake_backward(grad_output, query, key, value, output, logsumexp, is_causal, scale):
    return heads_like(query, query.shape[2]), heads_like(key, key.shape[2]), heads_like(value, value.shape[2])


def setup_context(ctx, inputs, output):
    query, key, value, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def differentiate(backward):
    """The autograd formula around a backend's backward operator."""

    def formula(ctx, grad_output, grad_logsumexp):
        if grad_output is None:
            return None, None, None, None, None
        query, key, value, output, logsumexp = ctx.saved_tensors
        grads = backward(grad_output, query, key, value, output, logsumexp, ctx.is_causal, ctx.scale)
        return *grads, None, None

    return formula


if backends.library() is not None:
    torch.library.register_fake("lmengine::attention_forward", fake_forward)
    torch.library.register_fake("lmengine::attention_backward", fake_backward)
    torch.library.register_autograd(
        "lmengine::attention_forward",
        differentiate(lambda *args: torch.ops.lmengine.attention_backward(*args)),
        setup_context=setup_context,
    )

# ---- Triton ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("lmengine::attention_triton_forward", mutates_args=())
def triton_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from lmengine.kernels import attention as kernels

    return kernels.forward(query, key, value, is_causal, scale)


@torch.library.custom_op("lmengine::attention_triton_backward", mutates_args=())
def triton_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from lmengine.kernels import attention as kernels

    return kernels.backward(grad_output, query, key, value, output, logsumexp, is_causal, scale)


triton_forward.register_fake(fake_forward)
triton_backward.register_fake(fake_backward)
triton_forward.register_autograd(differentiate(triton_backward), setup_context=setup_context)


def triton_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    return triton_forward(query, key, value, is_causal, scale)[0]


operator.register("cuda", compiled, unsupported((torch.float32, torch.bfloat16, torch.float16)))
operator.register("triton", triton_attention, unsupported((torch.float32, torch.bfloat16, torch.float16)))
operator.register("cpu", compiled, unsupported((torch.float32, torch.bfloat16)))
operator.register("reference", reference, lambda *args, **kwargs: None)
