"""Corrections of Triton's interpreter, which the tests without a GPU run in.

It keeps bfloat16 as the integers that hold the bits (Triton 3.6 and 3.7). `tl.dot` multiplies those integers: here the
operands are widened to float32 first, which loses nothing. A cast of float32 to bfloat16 cuts the last bits off: here
it rounds to the nearest, ties to even, as a GPU does.

A dot product of float32 it leaves to BLAS, whose order of summation depends on the shapes, so that a product and the
transposed product differ. Compiled kernels multiply and add one element after the other, in both alike, and a backward
that computes its forward's scores again relies on that: here it is done so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def correct_arithmetic() -> None:
    """Make `tl.dot` and casts of bfloat16 do in the interpreter of this process what they do when compiled."""
    builder = interpreter.InterpreterBuilder
    original_dot, original_cast = builder.create_dot, builder.cast_impl
    if getattr(original_dot, "corrected", False):
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.dtype.scalar == tl.float32 and d.data.ndim == 2:
            return interpreter.TensorHandle(summed_in_order(a.data, b.data, d.data), tl.float32)
        return original_dot(self, widened(a), widened(b), d, *precision)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrowed(source.data), tl.bfloat16)
        return original_cast(self, source, to)

    create_dot.corrected = True  # type: ignore[attr-defined]
    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def summed_in_order(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums + a @ b in float32, one fused multiply-add after the other along the rows of b."""
    a, b = a.astype(np.float64), b.astype(np.float64)  # which holds a product of two float32 exactly
    for index in range(len(b)):
        sums = (sums + a[:, index, None] * b[index]).astype(np.float32)
    return sums


def widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)
