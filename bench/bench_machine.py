"""What the machine was seen to do at most: the peaks that the report divides by.

A large product of matrices for the arithmetic, a large copy for the memory (as bytes read and written a second, in the
entry's `bytes`).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench import gpu
from lmengine.ops.matmul import matmul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cpu_samples(call: Any, rounds: int) -> list[float]:
    call()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def describe(benchmark: Any, shape: str, dtype: str, implementation: str = "torch", **numbers: int) -> None:
    benchmark.group = f"machine {shape} {dtype}"
    benchmark.extra_info.update(
        family="machine", implementation=implementation, shape=shape, dtype=dtype, direction="forward", **numbers
    )


PRODUCTS = {"torch": torch.matmul, "lmengine cpu": matmul}  # the faster of them is the peak


@pytest.mark.parametrize("implementation", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_cpu_product(benchmark: Any, dtype: torch.dtype, implementation: str) -> None:
    size = 2048
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    describe(benchmark, f"product of {size} x {size}", name_of(dtype), implementation, flops=2 * size**3)
    benchmark.extra_info["samples"] = cpu_samples(lambda: PRODUCTS[implementation](left, right), 20)
    benchmark.pedantic(lambda: PRODUCTS[implementation](left, right), rounds=1)


def test_cpu_copy(benchmark: Any) -> None:
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    describe(benchmark, "copy of 256 MB", "float32", bytes=2 * source.nbytes)
    benchmark.extra_info["samples"] = cpu_samples(lambda: target.copy_(source), 20)
    benchmark.pedantic(lambda: target.copy_(source), rounds=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gpu_product(benchmark: Any, dtype: torch.dtype) -> None:
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    describe(benchmark, f"product of {size} x {size}", name_of(dtype), flops=2 * size**3)
    gpu.measure(benchmark, lambda: left @ right)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_copy(benchmark: Any) -> None:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    describe(benchmark, "copy of 1 GB", "float32", bytes=2 * source.nbytes)
    gpu.measure(benchmark, lambda: target.copy_(source))
