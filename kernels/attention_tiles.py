"""The tile sizes of attention's Triton kernels: what may be launched, all in one place."""

from __future__ import annotations

from typing import Any

import torch
import triton

# By kernel and the wider of the two head_dims, rounded up to a power of two: BLOCK_M, BLOCK_N, num_warps, num_stages.
# Where there are several, the fastest is measured at the first call. All are free of spills, and without TMA they keep
# to the 99 KB of shared memory that sm_86 and sm_89 have.
PLAIN = {
    "forward": {
        32: [(128, 64, 4, 3)],
        64: [(128, 64, 4, 3), (128, 64, 8, 3)],
        128: [(64, 64, 4, 2), (128, 32, 8, 3)],
        256: [(64, 32, 8, 2)],
    },
    "grad_key_value": {
        32: [(64, 64, 4, 2)],
        64: [(32, 64, 4, 2)],
        128: [(64, 64, 8, 2), (32, 64, 8, 2)],
        256: [(32, 32, 8, 1)],
    },
    "grad_query": {
        32: [(64, 64, 4, 2)],
        64: [(128, 64, 8, 2), (64, 32, 4, 2)],
        128: [(64, 64, 8, 2), (64, 32, 4, 2)],
        256: [(32, 32, 4, 1)],
    },
}
TMA = {  # sm_90 and later
    "forward": {
        32: [(128, 64, 4, 3)],
        64: [(128, 128, 8, 3), (128, 64, 4, 3)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3)],
        256: [(128, 64, 8, 2)],
    },
    "grad_key_value": {
        32: [(64, 64, 4, 2)],
        64: [(64, 128, 8, 2), (64, 64, 4, 2)],
        128: [(64, 128, 8, 2), (64, 64, 8, 2)],
        256: [(32, 32, 8, 2)],
    },
    "grad_query": {
        32: [(128, 64, 8, 2)],
        64: [(128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2)],
        256: [(64, 32, 8, 2)],
    },
}
GENERAL = {  # masks, ALiBi, soft-capping and dropout take registers
    "forward": {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    "grad_key_value": {32: (32, 32, 4, 1), 64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 1)},
    "grad_query": {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (32, 32, 4, 1)},
}
SINGLE = {  # float32: without tensor cores small tiles, so that nothing spills
    "forward": {32: (32, 32, 4, 1), 64: (32, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
    "grad_key_value": {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (32, 16, 8, 1)},
    "grad_query": {32: (32, 16, 4, 1), 64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)},
}


def tiles(kernel: str, arguments: dict[str, Any]) -> list[dict[str, int]]:
    """The configurations of a kernel that may be launched with arguments, for lmengine.kernels.launch.Launch."""
    head_dim, value_dim = arguments.get("HEAD_DIM", 0), arguments["VALUE_DIM"]
    block_d, block_e = (max(32, triton.next_power_of_2(dim)) for dim in (head_dim, value_dim))
    if kernel == "delta":
        return [{"BLOCK_M": 64, "BLOCK_E": block_e, "num_warps": 4 if block_e < 256 else 8, "num_stages": 1}]
    widest = max(block_d, block_e)
    if arguments["query"].dtype == torch.float32:
        found = [SINGLE[kernel][widest]]
    elif arguments["SPLIT"]:
        found = (TMA if arguments["TMA"] else PLAIN)[kernel][widest]
    else:
        found = [GENERAL[kernel][widest]]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "BLOCK_E": block_e, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in found
    ]
