"""The operators, one file a family: checks, choice of backend, fake and autograd registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmengine.backends import OPERATORS, Explanation
from lmengine.ops.attention import attention
from lmengine.ops.decoding import attention_decode

__all__ = ["attention", "attention_decode", "explain"]


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call would run on, and why not the others. Print the result.

    Args:
        operator: an operator's name ("attention", "attention_decode", "lstm", "cooccurrence", "glove_epoch") or a function or layer
            of lmengine that has one.
        args, kwargs: the call's own arguments.

    Raises:
        ValueError: no operator is called that; the message lists those that are.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "operator_name", None)
    if name not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(sorted(OPERATORS))}, got {operator!r}")
    return OPERATORS[name].explain(*args, **kwargs)


from lmengine.ops import cooccurrence as cooccurrence  # noqa: E402
from lmengine.ops import embedding as embedding  # noqa: E402
from lmengine.ops import matmul as matmul  # noqa: E402
from lmengine.ops import recurrent as recurrent  # noqa: E402
