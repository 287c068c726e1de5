"""Checks of arguments: the error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def shown(value: Any) -> str:
    """A value as an error message shows it: short, and with the type of what is not a number or a string."""
    if value is None or isinstance(value, (bool, int, float, np.number)):
        return str(value)
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if isinstance(value, str) else f"{type(value).__name__} {text}"


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise TypeError unless `value` is a whole number, ValueError unless it is from `low` to `high`."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {shown(value)}")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {span}, got {value}")


def check_above_zero(name: str, value: Any, infinite: bool = False) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is above 0 and finite (or may be infinite)."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    if not value > 0 or (value == math.inf and not infinite):
        raise ValueError(f"{name}: expected a {'' if infinite else 'finite '}number above 0, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_callable(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {shown(value)}")
