"""The output layer of a language model and its cross-entropy in one, without the matrix of all scores.

R: rows (tokens), V: vocabulary_size, E: embedding_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmengine.ops.matmul import linear, matmul

CHUNK = 384  # rows; their scores stay in the cache


def linear_cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows of cross_entropy(features @ weight.T + bias, targets).

    The scores are made 384 rows at a time and their gradients in the same turn, so that memory does not grow with
    R * V. First derivatives only.

    Args:
        features: (R, E), a floating dtype.
        weight: (V, E), bias: (V,), of the same dtype and device.
        targets: (R,) int64, in [0, V).

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: shapes do not go together; the message names the argument.
    """
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1] or len(features) == 0:
        expected = f"(rows, {weight.shape[-1]}) with at least one row"
        raise ValueError(f"features: expected shape {expected}, got {tuple(features.shape)}")
    for name, tensor, shape in (("bias", bias, weight.shape[:1]), ("targets", targets, features.shape[:1])):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if not torch.is_grad_enabled():  # the function itself cannot see that
        features, weight, bias = features.detach(), weight.detach(), bias.detach()
    return _LinearCrossEntropy.apply(features, weight, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        grad_features = torch.empty_like(features) if needed[0] else None
        wide = torch.promote_types(features.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needed[2] else None
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for begin in range(0, len(features), CHUNK):
            rows = slice(begin, begin + CHUNK)
            scores = linear(features[rows], weight, bias).to(wide)  # (CHUNK, V)
            logsumexp = scores.logsumexp(1, keepdim=True)
            total += (logsumexp - scores.gather(1, targets[rows, None])).sum()
            if not any(needed):
                continue
            grad = scores.sub_(logsumexp).exp_()  # of the scores, times R
            grad.scatter_add_(1, targets[rows, None], grad.new_full((len(grad), 1), -1.0))
            grad.div_(len(features))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(features.dtype)
            if grad_features is not None:
                grad_features[rows] = matmul(grad, weight)
            if grad_weight is not None:
                grad_weight += matmul(grad.t(), features[rows])
        ctx.save_for_backward(grad_features, grad_weight, grad_bias)
        ctx.dtype = features.dtype
        return (total / len(features)).to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(g if g is None else (g * grad).to(ctx.dtype) for g in ctx.saved_tensors), None)
