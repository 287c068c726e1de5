"""GloVe's epoch in Triton: one launch a stage, one program a partition, which visits its entries in order.

Partitions of a stage share no row and no column, so programs never touch the same vector and the result is that of
visiting the entries one after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lmengine.kernels.configuration import StaticConfiguration
from torch import Tensor

MAX_DIM = 2047


@triton.jit
def clipped(x, bound):
    # compared, since the minimum and the maximum of a NaN and a number are the number
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def epoch_kernel(
    parameters,  # (2, vocabulary, dim + 1)
    squared_gradients,  # (2, vocabulary, dim + 1)
    rows,  # (entries) int32
    columns,  # (entries) int32
    logs,  # (entries): log x
    weights,  # (entries): min(1, (x / x_max)^alpha)
    bounds,  # (partitions + 1) int64, of this stage
    costs,  # (partitions) float64, of this stage
    vocabulary_size,
    dim,
    eta,
    grad_clip,
    BLOCK: tl.constexpr,
):
    partition = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    mask = k <= dim
    width = dim + 1
    contexts = vocabulary_size.to(tl.int64) * width  # where the context vectors begin
    begin = tl.load(bounds + partition)
    end = tl.load(bounds + partition + 1)
    cost = tl.zeros((), tl.float64)
    for entry in range(begin, end):
        at_word = tl.load(rows + entry).to(tl.int64) * width + k
        at_context = contexts + tl.load(columns + entry).to(tl.int64) * width + k
        word = tl.load(parameters + at_word, mask=mask, other=0.0)
        context = tl.load(parameters + at_context, mask=mask, other=0.0)
        word_squares = tl.load(squared_gradients + at_word, mask=mask, other=1.0)
        context_squares = tl.load(squared_gradients + at_context, mask=mask, other=1.0)
        # the last number of a vector is its bias, which is added, not multiplied
        difference = tl.sum(tl.where(k < dim, word * context, word + context), axis=0) - tl.load(logs + entry)
        weighted = tl.load(weights + entry) * difference
        cost += weighted.to(tl.float64) * difference * 0.5
        word_gradient = weighted * tl.where(k < dim, context, 1.0)
        context_gradient = weighted * tl.where(k < dim, word, 1.0)
        word_gradient = eta * clipped(word_gradient, grad_clip)
        context_gradient = eta * clipped(context_gradient, grad_clip)
        tl.store(parameters + at_word, word - word_gradient * tl.rsqrt(word_squares), mask=mask)
        tl.store(parameters + at_context, context - context_gradient * tl.rsqrt(context_squares), mask=mask)
        tl.store(squared_gradients + at_word, word_squares + word_gradient * word_gradient, mask=mask)
        tl.store(squared_gradients + at_context, context_squares + context_gradient * context_gradient, mask=mask)
    tl.store(costs + partition, cost)


def glove_epoch(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    stages: Tensor,
    eta: float,
    x_max: float,
    alpha: float,
    grad_clip: float,
) -> Tensor:
    """Changes parameters and squared_gradients; returns the cost. See lmengine/ops/embedding.py, which checks."""
    vocabulary_size, dim = parameters.shape[1], parameters.shape[2] - 1
    logs = values.log()
    weights = (values / x_max).pow(alpha).clamp(max=1)
    partitions = stages.shape[1] - 1
    costs = torch.zeros(len(stages), partitions, dtype=torch.float64, device=parameters.device)
    block, warps = launch_size(dim)
    for bounds, stage_costs in zip(stages, costs, strict=True):
        epoch_kernel[(partitions,)](
            parameters, squared_gradients, rows, columns, logs, weights, bounds, stage_costs,
            vocabulary_size, dim, eta, grad_clip, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return costs.sum()


def launch_size(dim: int) -> tuple[int, int]:
    """Numbers a program holds of a vector, and its warps: one for up to 4 numbers a thread."""
    block = max(32, triton.next_power_of_2(dim + 1))
    return block, max(1, block // 256)


def static_configurations() -> list[StaticConfiguration]:
    pointers = {"parameters": "*fp32", "squared_gradients": "*fp32", "rows": "*i32", "columns": "*i32",
                "logs": "*fp32", "weights": "*fp32", "bounds": "*i64", "costs": "*fp64"}  # fmt: skip
    numbers = {"vocabulary_size": "i32", "dim": "i32", "eta": "fp32", "grad_clip": "fp32"}
    return [
        StaticConfiguration(
            name=f"glove_epoch up to dim {block - 1}",
            kernel=epoch_kernel,
            signature={**pointers, **numbers},
            constants={"BLOCK": block},
            num_warps=launch_size(block - 1)[1],
        )
        for block in (32, 64, 128, 256, 512, 1024, 2048)
    ]
