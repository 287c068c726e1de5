"""Triton kernels for test_static.py: one that keeps every limit and some that each break one."""

import triton
import triton.language as tl
from lmengine.kernels.configuration import StaticConfiguration


@triton.jit
def product(a, b, out, length, block: tl.constexpr, step: tl.constexpr):
    """out (block, block) = a (block, length) b (length, block)"""
    rows, inner = tl.arange(0, block), tl.arange(0, step)
    total = tl.zeros((block, block), tl.float32)
    for start in range(0, length, step):
        left = tl.load(a + rows[:, None] * length + start + inner[None, :])
        right = tl.load(b + (start + inner)[:, None] * block + rows[None, :])
        total += tl.dot(left, right)
    tl.store(out + rows[:, None] * block + rows[None, :], total)


@triton.jit
def copy(a, out, block: tl.constexpr):
    index = tl.arange(0, block)
    tl.store(out + index, tl.load(a + index))


def configuration(name: str, block: int, step: int, num_warps: int = 4, num_stages: int = 2) -> StaticConfiguration:
    return StaticConfiguration(
        name=name,
        kernel=product,
        signature={"a": "*bf16", "b": "*bf16", "out": "*fp32", "length": "i32"},
        constants={"block": block, "step": step},
        num_warps=num_warps,
        num_stages=num_stages,
        divisible_by_16=frozenset({"length"}),
        matrix_instructions=True,
    )


def static_configurations() -> list[StaticConfiguration]:
    return [
        configuration("right", 64, 32),
        configuration("spills", 128, 64, num_warps=1),
        configuration("too much shared memory", 128, 128, num_warps=8, num_stages=5),
        StaticConfiguration(
            "no matrix instructions", copy, {"a": "*fp32", "out": "*fp32"}, {"block": 128}, matrix_instructions=True
        ),
        configuration("does not compile", 48, 32),
    ]
