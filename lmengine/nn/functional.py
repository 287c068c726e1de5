"""Drop-in functions of torch.nn.functional."""

from __future__ import annotations

import torch
from torch import Tensor

from lmengine.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention on lmengine's kernels.

    Args:
        query: (..., query length, head_dim), at least two dimensions.
        key: (..., key length, head_dim); the leading dimensions of all three broadcast.
        value: (..., key length, head_dim).
        attn_mask: not supported yet, must be None.
        dropout_p: not supported yet, must be 0.
        is_causal: a query sees the keys at its own position and before, both counted from the start.
        scale: 1/sqrt(head_dim) where it is None.
        enable_gqa: not supported yet, must be False.

    Returns:
        (..., query length, head_dim), in autocast's dtype where autocast is on.

    Raises:
        NotImplementedError: an argument is not supported yet; the message names it.
        RuntimeError: shapes, dtypes or devices do not go together.
        TypeError: query, key or value is not a tensor.
    """
    _check(query, key, value, attn_mask, dropout_p, enable_gqa)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dim() == 4 and key.shape[:2] == query.shape[:2] == value.shape[:2]:
        return attention(query, key, value, is_causal, scale)

    leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    heads = leading[-1] if leading else 1
    batch = leading[:-1].numel()  # 1 where there are no such dimensions
    query, key, value = (
        tensor.expand(*leading, *tensor.shape[-2:]).reshape(batch, heads, *tensor.shape[-2:])
        for tensor in (query, key, value)
    )
    return attention(query, key, value, is_causal, scale).reshape(*leading, *query.shape[-2:])


scaled_dot_product_attention.operator_name = "attention"  # type: ignore[attr-defined]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise RuntimeError(f"{name}: expected at least 2 dimensions, got {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise RuntimeError(f"{name}: expected device {query.device}, got {tensor.device}")
        mixed = tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type)
        if mixed or not tensor.is_floating_point():
            wanted = query.dtype if query.is_floating_point() else "a floating dtype"
            raise RuntimeError(f"{name}: expected {wanted}, got {tensor.dtype}")
    if attn_mask is not None:
        raise NotImplementedError("attn_mask: expected None (masks other than is_causal are not supported yet)")
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout_p: expected a number from 0 to 1, got {dropout_p}")
    if dropout_p:
        raise NotImplementedError(f"dropout_p: expected 0 (dropout is not supported yet), got {dropout_p}")
    if enable_gqa:
        raise NotImplementedError("enable_gqa: expected False (grouped queries are not supported yet)")
    head_dim, length = query.shape[-1], key.shape[-2]
    if head_dim == 0:
        raise NotImplementedError("query: expected a head_dim above 0")
    if key.shape[-1] != head_dim:
        raise RuntimeError(f"key: expected the query's head_dim {head_dim}, got {key.shape[-1]}")
    if value.shape[-2] != length:
        raise RuntimeError(f"value: expected the key's length {length}, got {value.shape[-2]}")
    if value.shape[-1] != head_dim:
        raise NotImplementedError(f"value: expected the query's head_dim {head_dim}, got {value.shape[-1]}")
