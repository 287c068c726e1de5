"""A Triton kernel with its arguments, to be run with the best of some tile sizes, or described for bench/static.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from lmengine.kernels.configuration import StaticConfiguration
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip

_chosen: dict[Any, dict[str, Any]] = {}


@dataclass(frozen=True)
class Launch:
    """A kernel whose one-dimensional grid has a program for each block of `length`, `copies` times.

    Attributes:
        block: the name of the constexpr that is a block's size.
        arguments: all but those of the configurations, by name; None for what the call lacks.
        configurations: tile sizes, num_warps and num_stages, by name. The first is taken where they cannot be tried:
            without a GPU, in a graph capture, and for a kernel that adds to memory.
        descriptors: where arguments has TMA, the arguments of four dimensions that become tensor descriptors, and the
            constexprs that are the rows and columns of their blocks.
        again: whether the kernel may run twice with the same result.
    """

    kernel: Any
    length: int
    block: str
    copies: int
    arguments: dict[str, Any]
    configurations: Sequence[dict[str, Any]]
    descriptors: dict[str, str]
    again: bool = True

    def run(self) -> None:
        if self.length * self.copies:
            with torch.cuda.device_of(next(a for a in self.arguments.values() if isinstance(a, torch.Tensor))):
                self.run_with(self.configuration())

    def run_with(self, configuration: dict[str, Any]) -> None:
        grid = triton.cdiv(self.length, configuration[self.block]) * self.copies
        self.kernel[(grid,)](**self.arguments | self.described_tensors(configuration), **configuration)

    def described_tensors(self, configuration: dict[str, Any]) -> dict[str, TensorDescriptor]:
        found = {}
        if self.arguments.get("TMA"):
            for name, sizes in self.descriptors.items():
                tensor, block = self.arguments[name], [1, 1, *(configuration[size] for size in sizes.split())]
                # the stride of a dimension of size 1 is any multiple of 16 bytes
                strides = [tensor.stride(d) if tensor.shape[d] > 1 else 16 for d in range(3)]
                found[name] = TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block)
        return found

    def configuration(self) -> dict[str, Any]:
        """The fastest configuration, measured at the first call of a kind; the batch is not part of the kind."""
        first = self.configurations[0]
        if len(self.configurations) == 1 or not self.again or not torch.cuda.is_available():
            return first
        arguments = (kind_of(name, value) for name, value in self.arguments.items())
        kind = (self.kernel, torch.cuda.current_device(), self.length >= 1024, *arguments)
        if kind not in _chosen:
            if torch.cuda.is_current_stream_capturing():
                return first
            _chosen[kind] = min(self.configurations, key=self.milliseconds)
        return _chosen[kind]

    def milliseconds(self, configuration: dict[str, Any]) -> float:
        return triton.testing.do_bench(lambda: self.run_with(configuration), warmup=5, rep=20, return_mode="median")

    def described(self, name: str, configuration: dict[str, Any], matrix_instructions: bool) -> StaticConfiguration:
        """As Triton would compile it for these arguments; tensors may be on the device "meta"."""
        kernel = self.kernel
        if not isinstance(kernel, triton.JITFunction):  # the interpreter's
            kernel = triton.JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
        parameters = {parameter.name: parameter for parameter in kernel.params}
        constants = {n: v for n, v in configuration.items() if n in parameters}
        descriptors = self.described_tensors(configuration)
        signature, divisible = {}, set()
        for argument, value in self.arguments.items():
            parameter = parameters[argument]
            specialised = not parameter.do_not_specialize
            if argument in descriptors:
                block = ",".join(map(str, descriptors[argument].block_shape))
                signature[argument] = f"tensordesc<{TYPES[value.dtype]}[{block}]>"
            elif parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
                constants[argument] = value
            elif isinstance(value, torch.Tensor):
                signature[argument] = f"*{TYPES[value.dtype]}"
            elif isinstance(value, float):
                signature[argument] = "fp32"
            else:
                signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialised and value % 16 == 0:
                    divisible.add(argument)
        return StaticConfiguration(
            name, self.kernel, signature, constants, configuration["num_warps"], configuration["num_stages"],
            frozenset(divisible), matrix_instructions,
        )  # fmt: skip


def kind_of(name: str, value: Any) -> Any:
    """What a kernel is compiled anew for, and no more: constexprs, a tensor's dtype, and whether a number is there."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if name.isupper() else value is None
