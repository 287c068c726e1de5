"""Drop-in functions of torch.nn.functional."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

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
        query: (..., heads, query length, head_dim), or (query length, head_dim).
        key: (..., heads, key length, head_dim); the leading dimensions of all three broadcast.
        value: (..., heads, key length, the values' head_dim).
        attn_mask: broadcasts to (..., heads, query length, key length). Bool: True where the query sees the key.
            Floating, of the query's dtype or float32: added to the scores; it may require a gradient. Of a CausalBias
            of torch.nn.attention.bias no mask is built.
        dropout_p: the probability that a weight is set to 0; the others are divided by 1 - dropout_p. As in torch it
            is applied in evaluation too, unless it is 0 there. PyTorch's generator gives the seed; the weights that
            are dropped are not those that torch's function would drop.
        is_causal: a query sees the keys at its own position and before, both counted from the start. With attn_mask
            a query sees the keys that both let it see, as in torch's CPU kernel (elsewhere torch raises).
        scale: 1/sqrt(head_dim) where it is None.
        enable_gqa: key and value may have fewer heads than the query, a divisor of its number.

    Returns:
        (..., heads, query length, the values' head_dim), in autocast's dtype where autocast is on. A query that sees
        no key gives 0.

    Raises:
        NotImplementedError: nested tensors.
        RuntimeError: shapes, dtypes or devices do not go together; the message names the argument.
        TypeError: an argument is not a tensor.
        ValueError: a CausalBias together with is_causal.
    """
    if attn_mask is None and not dropout_p and not enable_gqa:
        try:  # the commonest calls go straight to the operator
            if (
                query.dim() == 4
                and not query.is_nested
                and query.shape == key.shape == value.shape
                and query.device == key.device == value.device
                and not torch.is_autocast_enabled(query.device.type)
            ):
                return attention(query, key, value, is_causal, scale)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError):
            pass  # where the operator refuses, the long way finds out what it was

    bottom_right = False
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError("is_causal: expected False with a CausalBias as attn_mask, got True")
        check_causal_bias(attn_mask, query, key)
        is_causal, bottom_right, attn_mask = True, attn_mask.variant == CausalVariant.LOWER_RIGHT, None
    check_tensors(query, key, value, attn_mask, dropout_p)
    query, key, value = under_autocast(query), under_autocast(key), under_autocast(value)
    check_dtypes(query, key, value)
    if scale is None and query.shape[-1] == 0:
        scale = 1.0  # of scores that are 0

    before, heads, kv_heads = leading_dims(query, key, value, enable_gqa)
    q = with_four_dims(query, before, heads)
    k, v = (with_four_dims(repeated(tensor, kv_heads), before, kv_heads) for tensor in (key, value))
    mask = None if attn_mask is None else mask_with_four_dims(under_autocast(attn_mask), before, q, k)
    output = attention(q, k, v, is_causal, scale, mask=mask, bottom_right=bottom_right, dropout_p=dropout_p)
    if query.dim() == key.dim() == value.dim() == 2:
        return output[0, 0]
    return output if len(before) == 1 else output.reshape(*before, *output.shape[1:])


scaled_dot_product_attention.operator_name = "attention"  # type: ignore[attr-defined]


def under_autocast(tensor: Tensor) -> Tensor:
    """As torch.autocast gives a tensor to an operator that it runs in its lower precision."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


def leading_dims(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[torch.Size, int, int]:
    """What the dimensions before the heads broadcast to, the query's heads, and those of key and value."""
    n, m, k = (tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in (query, key, value))
    before = query.shape[:-3]
    if not before == key.shape[:-3] == value.shape[:-3]:
        before = torch.broadcast_shapes(before, key.shape[:-3], value.shape[:-3])
    if not enable_gqa:
        heads = n if n == m == k else torch.broadcast_shapes((n,), (m,), (k,))[0]
        return before, heads, heads
    for name, number in (("key", m), ("value", k)):
        if number == 0 or n % number:
            raise RuntimeError(f"{name}: expected a number of heads that divides the query's {n}, got {number}")
    return before, n, m if m == k else n


def repeated(tensor: Tensor, heads: int) -> Tensor:
    """Key or value with each head repeated where the other one has more; 1 head broadcasts by itself."""
    if tensor.dim() > 2 and tensor.shape[-3] not in (1, heads):
        return tensor.repeat_interleave(heads // tensor.shape[-3], -3)
    return tensor


def with_four_dims(tensor: Tensor, before: torch.Size, heads: int) -> Tensor:
    """Query, key or value as (all of before, heads, length, head_dim)."""
    rows = tensor.shape[-2:]
    if tensor.shape[:-2] != (*before, heads):
        tensor = tensor.expand(*before, heads, *rows)
    return tensor if len(before) == 1 else tensor.reshape(before.numel(), heads, *rows)


def mask_with_four_dims(mask: Tensor, before: torch.Size, query: Tensor, key: Tensor) -> Tensor:
    """The mask as (all of before or 1, heads or 1, query length or 1, key length or 1)."""
    full = (*before, *query.shape[1:3], key.shape[2])
    mask = mask[(None,) * (len(full) - mask.dim())] if mask.dim() < len(full) else mask
    if mask.dim() > len(full) or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        raise RuntimeError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attn_mask: expected bool, float32 or the query's {query.dtype}, got {mask.dtype}")
    if len(before) == 1:
        return mask
    if mask.shape[:-3].numel() != 1:
        mask = mask.expand(*before, *mask.shape[-3:])
    return mask.reshape(mask.shape[:-3].numel(), *mask.shape[-3:])


def check_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> None:
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["attn_mask"] = attn_mask
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise NotImplementedError(f"{name}: nested tensors are not supported; pad them, or see ops.attention")
        if tensor.dim() < 2 and name != "attn_mask":
            raise RuntimeError(f"{name}: expected at least 2 dimensions, got {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise RuntimeError(f"{name}: expected device {query.device}, got {tensor.device}")
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout_p: expected a number from 0 to 1, got {dropout_p}")
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(f"key: expected the query's head_dim {query.shape[-1]}, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(f"value: expected the key's length {key.shape[-2]}, got {value.shape[-2]}")


def check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            wanted = query.dtype if query.is_floating_point() else "a floating dtype"
            raise RuntimeError(f"{name}: expected {wanted}, got {tensor.dtype}")


def check_causal_bias(bias: CausalBias, query: Tensor, key: Tensor) -> None:
    sizes, lengths = (bias.seq_len_q, bias.seq_len_kv), (query.shape[-2], key.shape[-2])
    if sizes != lengths:
        raise RuntimeError(f"attn_mask: expected a CausalBias of the lengths {lengths}, got {sizes}")
