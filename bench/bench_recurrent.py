"""nn.LSTM beside torch.nn.LSTM with the same weights: forward without gradients, and forward with backward.

On a GPU the entries are our
two backends and PyTorch, which calls cuDNN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lmengine
import lmengine.nn
from bench import cpu, gpu

CPU_SECONDS = 1.2  # a cell's rounds together


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    hidden: int
    layers: int = 1
    input: int | None = None  # where it is not `hidden`

    @property
    def input_size(self) -> int:
        return self.input or self.hidden

    def __str__(self) -> str:
        name = f"batch {self.batch} x length {self.length} x hidden {self.hidden}"
        name += f", input {self.input}" if self.input else ""
        return name + (f", {self.layers} layers" if self.layers > 1 else "")

    def flops(self, direction: str) -> int:
        widths = self.input_size + (self.layers - 1) * self.hidden + self.layers * self.hidden
        products = 2 * self.length * self.batch * 4 * self.hidden * widths
        return products if direction == "forward" else 3 * products


CPU_SHAPES = [
    Shape(32, 64, 256, input=128),  # the main job's
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
    return cls(shape.input_size, shape.hidden, num_layers=shape.layers, device=device, dtype=dtype)


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

    def random(features: int) -> torch.Tensor:
        return torch.randn(shape.length, shape.batch, features, dtype=dtype, device=device)

    return [call(random(shape.input_size), random(shape.hidden)) for _ in range(count)]


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


def chosen(implementation: str) -> lmengine.use_backend:
    return lmengine.use_backend(implementation.removeprefix("lmengine ") if implementation != "torch" else "auto")


@functools.cache
def cpu_samples(shape: Shape, dtype: torch.dtype, direction: str) -> dict[str, list[float]]:
    """Seconds of each implementation's calls, with the same weights."""
    layers = {name: make_layer(name, shape, dtype, "cpu") for name in CPU_IMPLEMENTATIONS}
    calls = {name: make_calls(layer, shape, dtype, "cpu", direction, 1)[0] for name, layer in layers.items()}
    return cpu.samples_in_turn(calls, chosen, CPU_SECONDS)


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu(benchmark: Any, shape: Shape, dtype: torch.dtype, direction: str, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype, direction)
    benchmark.extra_info["samples"] = cpu_samples(shape, dtype, direction)[implementation]
    (call,) = make_calls(make_layer(implementation, shape, dtype, "cpu"), shape, dtype, "cpu", direction, 1)
    with chosen(implementation):
        benchmark.pedantic(call, rounds=1)  # pytest-benchmark wants a call of its own; the samples are those above


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark: Any, shape: Shape, dtype: torch.dtype, direction: str, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype, direction)
    layer = make_layer(implementation, shape, dtype, "cuda")
    input_bytes = shape.length * shape.batch * shape.input_size * dtype.itemsize
    calls = make_calls(layer, shape, dtype, "cuda", direction, max(1, gpu.L2_BYTES // input_bytes))
    with chosen(implementation):
        gpu.measure(benchmark, calls)
