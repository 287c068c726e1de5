"""attention_decode beside torch's scaled_dot_product_attention: one query a sequence against a full cache.

Decoding is bound by memory: an entry's `bytes` are those of the keys and values, each read once. On the CPU the
implementations of a cell are called in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import cpu, gpu
from bench.bench_attention import chosen, name_of
from lmengine.ops import attention_decode

CPU_SECONDS = 1.0  # a cell's rounds together


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"heads {self.heads}" + (f" of {self.kv_heads}" if self.kv_heads != self.heads else "")
        return f"batch {self.batch} x {heads} x 1 query, {self.length} keys x head_dim {self.head_dim}"

    def bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.batch * self.kv_heads * self.length * self.head_dim * dtype.itemsize


CPU_SHAPES = [
    Shape(batch, heads, kv_heads, 4096, head_dim)
    for batch, heads, kv_heads in ((1, 1, 1), (1, 8, 8), (1, 32, 8), (4, 8, 8), (4, 32, 8), (8, 16, 16))
    for head_dim in (64, 128)
]
GPU_SHAPES = [
    Shape(batch, heads, kv_heads, length, 128)
    for batch, heads, kv_heads, length in (
        (1, 32, 8, 4096), (1, 32, 8, 65536), (1, 32, 32, 65536), (1, 8, 1, 65536), (16, 32, 8, 4096), (64, 32, 8, 4096),
        (64, 32, 32, 2048),
    )
]  # fmt: skip
CPU_IMPLEMENTATIONS = ("lmengine cpu", "torch")
GPU_IMPLEMENTATIONS = ("lmengine cuda", "lmengine triton", "torch")


def make_call(implementation: str, shape: Shape, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    query = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, device=device).to(dtype)
    size = (shape.batch, shape.kv_heads, shape.length, shape.head_dim)
    key_cache, value_cache = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    if not implementation.startswith("lmengine"):
        grouped = shape.heads != shape.kv_heads
        return lambda: F.scaled_dot_product_attention(query, key_cache, value_cache, enable_gqa=grouped)
    lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device)
    return lambda: attention_decode(query, key_cache, value_cache, lengths)


def describe(benchmark: Any, implementation: str, shape: Shape, dtype: torch.dtype) -> None:
    benchmark.group = f"decoding {shape} {name_of(dtype)}"
    benchmark.extra_info.update(
        family="decoding",
        implementation=implementation,
        shape=str(shape),
        dtype=name_of(dtype),
        direction="forward",
        bytes=shape.bytes(dtype),
    )


@functools.cache
def cpu_samples(shape: Shape, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of each implementation's calls."""
    calls = {name: make_call(name, shape, dtype, "cpu") for name in CPU_IMPLEMENTATIONS}
    return cpu.samples_in_turn(calls, chosen, CPU_SECONDS)


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu(benchmark: Any, shape: Shape, dtype: torch.dtype, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype)
    benchmark.extra_info["samples"] = cpu_samples(shape, dtype)[implementation]
    benchmark.pedantic(lambda: None, rounds=1)  # pytest-benchmark wants a call of its own; the samples are those above


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark: Any, shape: Shape, dtype: torch.dtype, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype)
    count = max(1, gpu.L2_BYTES // shape.bytes(dtype))
    with chosen(implementation):
        gpu.measure(benchmark, [make_call(implementation, shape, dtype, "cuda") for _ in range(count)])
