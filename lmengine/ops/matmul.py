"""The matrix products of linear layers. On the CPU in float32 they run on lmengine's own kernel, because PyTorch's
takes twice the time on processors for which MKL has no AVX-512 path; everything else is PyTorch's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from lmengine.backends import forced_backend, library, unusable


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """input @ weight.T + bias, as `torch.nn.functional.linear`.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    """
    if not _is_ours(input, weight) or (bias is not None and bias.dtype != torch.float32):
        return F.linear(input, weight, bias)
    flat = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    return torch.ops.lmengine.matmul(flat, weight.t(), bias).reshape(*input.shape[:-1], weight.shape[0])


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right for matrices of any strides: (rows, depth) and (depth, columns)."""
    if not _is_ours(left, right):
        return left @ right
    return torch.ops.lmengine.matmul(left, right, None)


def _is_ours(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.device.type == right.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and forced_backend() in (None, "cpu")
        and unusable("cpu") is None
        and not torch.is_autocast_enabled("cpu")
    )


def _matmul_fake(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    left, right, _ = inputs
    ctx.save_for_backward(left, right)


def _matmul_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    left, right = ctx.saved_tensors
    needs_left, needs_right, needs_bias = ctx.needs_input_grad
    grad_right = None
    if needs_right:  # laid out as right is, so that a weight's gradient need not be copied
        transposed = right.stride(0) == 1
        grad_right = matmul(grad.t(), left).t() if transposed else matmul(left.t(), grad)
    return matmul(grad, right.t()) if needs_left else None, grad_right, grad.sum(0) if needs_bias else None


if library() is not None:
    torch.library.register_fake("lmengine::matmul", _matmul_fake)
    torch.library.register_autograd("lmengine::matmul", _matmul_backward, setup_context=_save_for_backward)
