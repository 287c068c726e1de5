"""Attention's CUDA kernels on the CPU, as functions of tensors: what tests/attention/cuda_host.cpp wraps."""

import torch
import torch.nn.functional as F

from lmengine.ops.attention import OPTIONS, lowered
from tests import cuda_host

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def widened(tensor, gap):
    """The memory of a (B, N, length, dim) tensor as (B, length, N, dim + gap)."""
    return F.pad(tensor.detach().transpose(1, 2), (0, gap), value=torch.nan).contiguous()


def broadcast_strides(tensor):
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def arguments(query, key, value, is_causal, scale, gap, options):
    """The inputs of both functions in their order."""
    values = dict(zip(OPTIONS, lowered(query, key, is_causal, scale, **options), strict=True))
    mask, slopes, starts = values["mask"], values["alibi_slopes"], values["cu_seqlens_q"]
    mask_type, strides, grad_strides = 0, [0] * 4, [0] * 4
    if mask is not None:
        mask_type = {torch.bool: 1, torch.float32: 2}.get(mask.dtype, 3)
        strides, grad_strides = broadcast_strides(mask), broadcast_strides(mask.detach().clone(memory_format=torch.contiguous_format))  # fmt: skip
        mask = mask.detach()
        if mask.numel():  # all of its memory, where the strides count
            last = sum((size - 1) * stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
            mask = mask.as_strided((last + 1,), (1,))
    batch = query.shape[0] if starts is None else len(starts) - 1
    numbers = [
        TYPES[query.dtype], batch, query.shape[1], key.shape[1], values["max_seqlen_q"], values["max_seqlen_k"],
        query.shape[2], key.shape[2], query.shape[3], value.shape[3], gap, values["window_left"],
        values["window_right"], values["bottom_right"], values["deterministic"],
        0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0), mask_type, *strides, *grad_strides,
    ]  # fmt: skip
    small = {name: values[name] for name in OPTIONS[1:7]}
    return {
        "numbers": torch.tensor([int(number) for number in numbers]),
        "factors": torch.tensor([scale, values["softcap"], values["dropout_p"]], dtype=torch.float64),
        **{name: widened(t, gap) for name, t in (("query", query), ("key", key), ("value", value))},
        "mask": mask,
        **small,
    }


def unwidened(tensor, dim):
    assert (tensor[..., dim:] == 7).all()  # what the kernels may not write keeps its value
    return tensor[..., :dim].transpose(1, 2)


def forward(library, query, key, value, is_causal=False, scale=None, *, gap=0, run=cuda_host.run, **options):
    """Output and logsumexp."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = arguments(query, key, value, is_causal, scale, gap, options)
    batch, heads, length, _ = query.shape
    outputs = {
        "output": torch.full((batch, length, heads, value.shape[3] + gap), 7, dtype=query.dtype),
        "logsumexp": (query.shape[:3], torch.float32),
    }
    done = run(library, "attention_forward", inputs, outputs)
    return unwidened(done["output"], value.shape[3]), done["logsumexp"]


def backward(
    library, grad_output, grad_logsumexp, query, key, value, output, logsumexp, is_causal=False, scale=None, *, gap=0,
    run=cuda_host.run, **options,
):  # fmt: skip
    """Gradients of query, key, value and, where it is floating and wants one, the mask (else None)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = arguments(query, key, value, is_causal, scale, gap, options)
    inputs |= {"output": widened(output, gap), "logsumexp": logsumexp, "grad_output": widened(grad_output, gap)}
    inputs["grad_logsumexp"] = grad_logsumexp
    mask = options.get("mask")
    outputs = {"delta": (query.shape[:3], torch.float32)}
    outputs |= {f"grad_{name}": torch.full_like(inputs[name], 7) for name in ("query", "key", "value")}
    outputs["grad_mask"] = (mask.shape, torch.float32) if mask is not None and mask.requires_grad else None
    found = run(library, "attention_backward", inputs, outputs)
    dims = (query.shape[3], key.shape[3], value.shape[3])
    grads = [unwidened(found[f"grad_{name}"], dim) for name, dim in zip(("query", "key", "value"), dims, strict=True)]
    return *grads, found["grad_mask"]


class Attention(torch.autograd.Function):
    """The kernels as a differentiable function; `options` holds what is no tensor that wants a gradient."""

    @staticmethod
    def forward(ctx, query, key, value, mask, library, options):
        given = options if mask is None else options | {"mask": mask}
        ctx.save_for_backward(query, key, value, mask, *(results := forward(library, query, key, value, **given)))
        ctx.library, ctx.options = library, options
        return results

    @staticmethod
    def backward(ctx, grad_output, grad_logsumexp):
        query, key, value, mask, output, logsumexp = ctx.saved_tensors
        given = ctx.options if mask is None else ctx.options | {"mask": mask}
        *grads, grad_mask = backward(
            ctx.library, grad_output, grad_logsumexp, query, key, value, output, logsumexp, **given
        )
        return *grads, None if grad_mask is None else grad_mask.to(mask.dtype), None, None


def attention(library, query, key, value, *, mask=None, **options):
    """Output and logsumexp, differentiable, as lmengine.ops.attention with the cuda backend."""
    return Attention.apply(query, key, value, mask, library, options)
