"""attention beside torch's scaled_dot_product_attention: forward without gradients, and forward with backward.

On the CPU the implementations of a cell are called in turn, so that what else the machine does hits all alike. On a GPU
the entries are our backends, PyTorch's own choice, its FlashAttention and cuDNN backends by name, and the flash-attn packages
where they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lmengine
from bench import cpu, gpu
from lmengine.nn.functional import scaled_dot_product_attention
from lmengine.ops.attention import attention

CPU_SECONDS = 1.6  # a cell's rounds together


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    length: int
    head_dim: int
    is_causal: bool

    def __str__(self) -> str:
        sizes = f"batch {self.batch} x heads {self.heads} x length {self.length} x head_dim {self.head_dim}"
        return sizes + (", causal" if self.is_causal else ", full")

    @property
    def elements(self) -> int:
        return self.batch * self.heads * self.length * self.head_dim

    def flops(self, direction: str) -> int:
        """Two products forward and five backward, half of each under the causal mask, as the literature counts."""
        forward = 4 * self.elements * self.length // (2 if self.is_causal else 1)
        return forward if direction == "forward" else forward * 7 // 2


# the main job's decoder, and a grid of larger ones
CPU_SHAPES = [Shape(32, 4, length, 32, True) for length in (64, 96, 128)] + [
    Shape(batch, 8, length, head_dim, is_causal)
    for batch, length in ((4, 128), (2, 512), (1, 2048), (1, 4096))
    for head_dim in (64, 128)
    for is_causal in (False, True)
]
# so small that crossing from Python into the kernel is what takes the time
SMALL = Shape(1, 2, 8, 16, False)
# of one head, whose matrix of scores would take 64 MB to 4 GB in float32
MEMORY_SHAPES = [Shape(1, 1, length, 64, True) for length in (4096, 8192, 16384, 32768)]
# 16 k tokens of 2048 features
GPU_SHAPES = [
    Shape(16384 // length, 2048 // head_dim, length, head_dim, is_causal)
    for head_dim in (64, 128)
    for length in (512, 1024, 2048, 4096, 8192, 16384)
    for is_causal in (False, True)
]
DIRECTIONS = ("forward", "forward+backward")
CPU_IMPLEMENTATIONS = ("lmengine cpu", "torch")
PEERS = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}  # the modules of flash_attn_func
GPU_IMPLEMENTATIONS = ("lmengine cuda", "lmengine triton", "torch", "torch flash", "torch cudnn", *PEERS)
SDPA_BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cudnn": SDPBackend.CUDNN_ATTENTION}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def chosen(implementation: str) -> Any:
    """The context in which a call runs an implementation."""
    if implementation.startswith("lmengine"):
        return lmengine.use_backend(implementation.removeprefix("lmengine "))
    if implementation in SDPA_BACKENDS:
        return sdpa_kernel(SDPA_BACKENDS[implementation])
    return contextlib.nullcontext()


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """query, key, value and the output's gradient, laid out as layers make them: the heads side by side in a row."""
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    return [torch.randn(size, device=device).to(dtype).transpose(1, 2) for _ in range(4)]


def make_call(implementation: str, shape: Shape, direction: str, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    query, key, value, grad_output = tensors
    ours = implementation.startswith("lmengine")
    peer = importlib.import_module(PEERS[implementation]).flash_attn_func if implementation in PEERS else None

    def output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if ours:
            return attention(query, key, value, shape.is_causal)
        if peer is not None:  # (batch, length, heads, head_dim), as the tensors lie in memory
            found = peer(*(tensor.transpose(1, 2) for tensor in (query, key, value)), causal=shape.is_causal)
            return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=shape.is_causal)

    if direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return output(query, key, value)

        return forward

    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    return lambda: torch.autograd.grad(output(*leaves), leaves, grad_output)


def describe(
    benchmark: Any, implementation: str, shape: Shape, dtype: torch.dtype, direction: str, family: str = "attention"
) -> None:
    benchmark.group = f"{family} {shape} {name_of(dtype)} {direction}"
    benchmark.extra_info.update(
        family=family,
        implementation=implementation,
        shape=str(shape),
        dtype=name_of(dtype),
        direction=direction,
        flops=shape.flops(direction),
    )


@functools.cache
def cpu_samples(shape: Shape, dtype: torch.dtype, direction: str) -> dict[str, list[float]]:
    """Seconds of each implementation's calls, on the same inputs."""
    tensors = make_inputs(shape, dtype, "cpu")
    calls = {name: make_call(name, shape, direction, tensors) for name in CPU_IMPLEMENTATIONS}
    return cpu.samples_in_turn(calls, chosen, CPU_SECONDS)


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu(benchmark: Any, shape: Shape, dtype: torch.dtype, direction: str, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype, direction)
    benchmark.extra_info["samples"] = cpu_samples(shape, dtype, direction)[implementation]
    call = make_call(implementation, shape, direction, make_inputs(shape, dtype, "cpu"))
    with chosen(implementation):
        benchmark.pedantic(call, rounds=1)  # pytest-benchmark wants a call of its own; the samples are those above


@functools.cache
def overhead_samples(direction: str) -> dict[str, list[float]]:
    """Seconds of a call on the smallest tensors; a sample is the mean of ten calls in a row."""
    query, key, value, grad_output = make_inputs(SMALL, torch.float32, "cpu")
    if direction == "forward+backward":
        for tensor in (query, key, value):
            tensor.requires_grad_()

    def ten_calls(function: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(10):
                output = function(query, key, value)
                if direction == "forward+backward":
                    torch.autograd.grad(output, (query, key, value), grad_output)

        return run

    calls = {
        "lmengine default": ten_calls(scaled_dot_product_attention),
        "torch": ten_calls(F.scaled_dot_product_attention),
    }
    samples = cpu.samples_in_turn(calls, lambda name: contextlib.nullcontext(), CPU_SECONDS)
    return {name: [seconds / 10 for seconds in numbers] for name, numbers in samples.items()}


@pytest.mark.parametrize("implementation", ["lmengine default", "torch"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_call_overhead(benchmark: Any, direction: str, implementation: str) -> None:
    describe(benchmark, implementation, SMALL, torch.float32, direction, "attention-overhead")
    del benchmark.extra_info["flops"]
    benchmark.extra_info["samples"] = overhead_samples(direction)[implementation]
    benchmark.pedantic(lambda: None, rounds=1)


# prints how much more memory than before a forward and backward held at its peak, gradients included
MEMORY_PROGRAM = """
import torch
from bench.bench_attention import MEMORY_SHAPES, chosen, make_call, make_inputs
torch.manual_seed(0)
def held(what):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
for warm_up in (MEMORY_SHAPES[0].__class__(1, 1, 64, 64, True), MEMORY_SHAPES[{index}]):
    call = make_call({name!r}, warm_up, "forward+backward", make_inputs(warm_up, torch.float32, "cpu"))
    before = held("VmRSS")
    with chosen({name!r}), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
        file.flush()
        call()
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("index", range(len(MEMORY_SHAPES)))
def test_memory(benchmark: Any, index: int, implementation: str) -> None:
    """In a process of its own, so that nothing lies ready from another call."""
    describe(benchmark, implementation, MEMORY_SHAPES[index], torch.float32, "forward+backward", "attention-memory")
    del benchmark.extra_info["flops"]
    program = MEMORY_PROGRAM.format(index=index, name=implementation)
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    benchmark.extra_info.update(samples=[float(done.stdout)], unit="bytes")
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark: Any, shape: Shape, dtype: torch.dtype, direction: str, implementation: str) -> None:
    describe(benchmark, implementation, shape, dtype, direction)
    if implementation in PEERS:
        pytest.importorskip(PEERS[implementation])
    count = max(1, gpu.L2_BYTES // (3 * shape.elements * dtype.itemsize))
    calls = [make_call(implementation, shape, direction, make_inputs(shape, dtype, "cuda")) for _ in range(count)]
    with chosen(implementation):
        if implementation in SDPA_BACKENDS:
            try:
                calls[0]()
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                pytest.skip(f"{implementation}: {error}")
        gpu.measure(benchmark, calls)
