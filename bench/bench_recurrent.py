"""nn.LSTM beside torch.nn.LSTM with the same weights: forward without gradients, and forward with backward.

On the CPU the rounds of a cell are short, so run it on a machine that does nothing else. On a GPU the entries are our
two backends and PyTorch, which calls cuDNN.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lmengine
import lmengine.nn
from bench import gpu

CPU_SECONDS = 0.6  # a cell's rounds together
ROUNDS = (7, 300)  # at least and at most
L2_BYTES = 64 << 20  # more than any GPU's L2 cache has


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    hidden: int  # the input's size too
    layers: int = 1

    def __str__(self) -> str:
        name = f"batch {self.batch} x length {self.length} x hidden {self.hidden}"
        return name + (f", {self.layers} layers" if self.layers > 1 else "")

    def flops(self, direction: str) -> int:
        products = self.layers * 2 * self.length * self.batch * 4 * self.hidden * (self.hidden + self.hidden)
        return products if direction == "forward" else 3 * products


CPU_SHAPES = [
    Shape(32, 35, 128),
    Shape(32, 35, 256),
    Shape(32, 64, 128),
    Shape(32, 64, 256),
    Shape(64, 64, 256),
    Shape(16, 128, 512),
    Shape(32, 35, 256, layers=2),
    Shape(1, 64, 256),
]
GPU_SHAPES = [Shape(b, length, h) for b in (16, 64, 128) for length in (128, 512) for h in (256, 512, 1024)]
DIRECTIONS = ("forward", "forward+backward")
CPU_IMPLEMENTATIONS = ("lmengine cpu", "torch")
GPU_IMPLEMENTATIONS = ("lmengine cuda", "lmengine triton", "torch")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_layer(implementation: str, shape: Shape, dtype: torch.dtype, device: str) -> torch.nn.Module:
    cls = torch.nn.LSTM if implementation == "torch" else lmengine.nn.LSTM
    torch.manual_seed(0)
    return cls(shape.hidden, shape.hidden, num_layers=shape.layers, device=device, dtype=dtype)


def make_calls(
    layer: torch.nn.Module, shape: Shape, dtype: torch.dtype, device: str, direction: str, count: int
) -> list[Callable[[], Any]]:
    """Calls that do the same work on `count` different inputs."""

    def call(input: torch.Tensor, grad: torch.Tensor) -> Callable[[], Any]:
        if direction == "forward":

            def forward() -> Any:
                with torch.no_grad():
                    return layer(input)

            return forward

        leaves = [input.requires_grad_(), *layer.parameters()]

        def forward_and_backward() -> Any:
            return torch.autograd.grad(layer(input)[0], leaves, grad)

        return forward_and_backward

    size = (shape.length, shape.batch, shape.hidden)
    return [
        call(torch.randn(size, dtype=dtype, device=device), torch.randn(size, dtype=dtype, device=device))
        for _ in range(count)
    ]


def describe(benchmark: Any, implementation: str, shape: Shape, dtype: torch.dtype, direction: str) -> None:
    benchmark.group = f"recurrent {shape} {name_of(dtype)} {direction}"
    benchmark.extra_info.update(
        family="recurrent",
        implementation=implementation,
        shape=str(shape),
        dtype=name_of(dtype),
        direction=direction,
        flops=shape.flops(direction),
    )


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu(benchmark: Any, shape: Shape, dtype: torch.dtype, direction: str, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype, direction)
    layer = make_layer(implementation, shape, dtype, "cpu")
    (call,) = make_calls(layer, shape, dtype, "cpu", direction, 1)
    with lmengine.use_backend("cpu" if implementation.startswith("lmengine") else "auto"):
        call()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        rounds = min(max(int(CPU_SECONDS / seconds), ROUNDS[0]), ROUNDS[1])
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark: Any, shape: Shape, dtype: torch.dtype, direction: str, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype, direction)
    layer = make_layer(implementation, shape, dtype, "cuda")
    input_bytes = shape.length * shape.batch * shape.hidden * dtype.itemsize
    calls = make_calls(layer, shape, dtype, "cuda", direction, max(1, L2_BYTES // input_bytes))
    backend = implementation.removeprefix("lmengine ")
    with lmengine.use_backend(backend if backend != implementation else "auto"):
        gpu.measure(benchmark, calls)
