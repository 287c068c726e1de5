"""Drop-in functions of torch.nn.functional."""

from __future__ import annotations

from torch import Tensor

from lmengine.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention on lmengine's kernels.

    Args:
        query: (..., query length, head_dim), at least three dimensions.
        key: (..., key length, head_dim), the leading dimensions of the query.
        value: (..., key length, head_dim).
        attn_mask: not supported yet, must be None.
        dropout_p: not supported yet, must be 0.
        is_causal: a query sees the keys at its own position and before, both counted from the start.
        scale: 1/sqrt(head_dim) where it is None.
        enable_gqa: not supported yet, must be False.

    Returns:
        (..., query length, head_dim).

    Raises:
        NotImplementedError: an argument is not supported yet; the message names it.
        ValueError, TypeError: shapes, dtypes or devices do not go together.
    """
    if attn_mask is not None:
        raise NotImplementedError("attn_mask: expected None (masks other than is_causal are not supported yet)")
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p: expected 0 (dropout is not supported yet), got {dropout_p}")
    if enable_gqa:
        raise NotImplementedError("enable_gqa: expected False (grouped queries are not supported yet)")
    if query.dim() == 4:
        return attention(query, key, value, is_causal, scale)
    if query.dim() < 3:
        raise ValueError(f"query: expected at least 3 dimensions, got {tuple(query.shape)}")
    leading = query.shape[:-2]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[:-2] != leading:
            raise ValueError(f"{name}: expected leading dimensions {tuple(leading)}, got {tuple(tensor.shape[:-2])}")
    flat = [tensor.reshape(-1, 1, *tensor.shape[-2:]) for tensor in (query, key, value)]
    return attention(flat[0], flat[1], flat[2], is_causal, scale).reshape(*leading, *query.shape[-2:])


scaled_dot_product_attention.operator_name = "attention"  # type: ignore[attr-defined]
