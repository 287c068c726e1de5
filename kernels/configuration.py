"""A Triton kernel as it may be launched, described so that it can be compiled and inspected without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StaticConfiguration:
    """One launchable configuration of a Triton kernel, for `python -m bench.static`.

    Attributes:
        name: family, direction and parameters, such as "attention_forward bf16 d64 causal".
        kernel: the @triton.jit function.
        signature: argument name -> Triton type ("*bf16", "*fp32", "i32", "i64", "fp32"), constexprs left out.
        constants: constexpr name -> value.
        num_warps, num_stages: as at launch.
        divisible_by_16: names of the arguments (pointers and integers) that the launcher's specialisation finds
            divisible by 16; pointers always are.
        matrix_instructions: whether the kernel must use tensor cores (HMMA on sm_80, HMMA or HGMMA on sm_90).
        architectures: those that it may be launched on.
        quick: whether the quick tests compile it; the slow ones compile all.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    matrix_instructions: bool = False
    architectures: tuple[int, ...] = (80, 90)
    quick: bool = True
