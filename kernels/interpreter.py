"""Corrections of Triton's interpreter, which the tests without a GPU run in.

It keeps bfloat16 as the integers that hold the bits (Triton 3.6 and 3.7). `tl.dot` multiplies those integers: here the
operands are widened to float32 first, which loses nothing. A cast of float32 to bfloat16 cuts the last bits off: here
it rounds to the nearest, ties to even, as a GPU does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def correct_bfloat16() -> None:
    """Make `tl.dot` and casts of bfloat16 right in the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    original_dot, original_cast = builder.create_dot, builder.cast_impl
    if getattr(original_dot, "corrected", False):
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return original_dot(self, widened(a), widened(b), d, *precision)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrowed(source.data), tl.bfloat16)
        return original_cast(self, source, to)

    create_dot.corrected = True  # type: ignore[attr-defined]
    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)
