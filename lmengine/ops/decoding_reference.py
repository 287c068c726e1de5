"""The reference of decoding: plain PyTorch over a copy of each sequence's cache, the definition of right.

B: batch, N: heads, M: heads of keys and values, Q: queries a sequence, K: keys that a cache has room for, D: head_dim,
E: the values' head_dim, R: rotary_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmengine.ops import attention_reference


def reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    scale: float | None = None,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Q, E) and logsumexp (B, N, Q) of `attention_decode`'s arguments; appends to the cache in place."""
    queries = query.shape[2]
    lengths = cache_lengths.long() + (0 if key is None else queries)  # (B,)
    positions = lengths[:, None] - queries + torch.arange(queries, device=query.device)  # (B, Q)
    first_seen = torch.zeros_like(lengths)
    if window_size[0] >= 0:
        first_seen = (lengths - queries - window_size[0]).clamp(min=0)
    capacity = key_cache.shape[2] if block_table is None else block_table.shape[1] * key_cache.shape[1]
    check_ranges(cache_lengths, 0 if key is None else queries, capacity, key_cache, block_table, first_seen, rotary_cos)
    if rotary_cos is not None and rotary_sin is not None:
        query = rotated(query, positions, rotary_cos, rotary_sin, rotary_interleaved)
        if key is not None:
            key = rotated(key, positions, rotary_cos, rotary_sin, rotary_interleaved)
    if key is not None and value is not None:
        append(key_cache, key, positions, block_table)
        append(value_cache, value, positions, block_table)
    if block_table is not None:
        key_cache, value_cache = (in_order(cache, block_table) for cache in (key_cache, value_cache))
    keys = torch.arange(capacity, device=query.device)
    seen = (keys < lengths[:, None]) & (keys >= first_seen[:, None])  # (B, K); what no query sees may be a NaN
    key_cache, value_cache = (cache.where(seen[:, None, :, None], 0) for cache in (key_cache, value_cache))
    return attention_reference.reference(
        query, key_cache, value_cache, True, scale, window_size=(window_size[0], -1), bottom_right=True,
        key_lengths=lengths, alibi_slopes=alibi_slopes, softcap=softcap,
    )  # fmt: skip


def rotated(tensor: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al. 2021): each pair of the first R dimensions turned by its position's angle.

    Args:
        tensor: (B, heads, Q, D).
        positions: (B, Q); a position before the sequence's begin, of a query that sees nothing, counts as 0.
        cos, sin: (positions, R / 2), of the angles.
        interleaved: the pairs are dimensions 2j and 2j + 1 (GPT-J), not j and j + R / 2 (GPT-NeoX).
    """
    half = cos.shape[1]
    cos, sin = (table[positions.clamp(min=0)][:, None].to(tensor.dtype) for table in (cos, sin))  # (B, 1, Q, R / 2)
    turning, rest = tensor[..., : 2 * half], tensor[..., 2 * half :]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    else:
        first, second = turning[..., :half], turning[..., half:]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned, rest], -1)


def append(cache: Tensor, new: Tensor, positions: Tensor, block_table: Tensor | None) -> None:
    """Writes (B, M, Q, D) into a cache at positions (B, Q)."""
    new = new.transpose(1, 2)  # (B, Q, M, D)
    if block_table is None:
        cache.transpose(1, 2)[torch.arange(len(new), device=new.device)[:, None], positions] = new
    else:
        page_size = cache.shape[1]
        cache[block_table.long().gather(1, positions // page_size), positions % page_size] = new


def in_order(cache: Tensor, block_table: Tensor) -> Tensor:
    """A paged cache (blocks, page_size, M, D) as (B, M, max_blocks * page_size, D)."""
    if len(cache) == 0:
        return cache.new_zeros(len(block_table), cache.shape[2], 0, cache.shape[3])
    return cache[block_table.long().clamp(0, len(cache) - 1)].flatten(1, 2).transpose(1, 2)


def check_ranges(
    cache_lengths: Tensor, added: int, capacity: int, key_cache: Tensor, block_table: Tensor | None, first_seen: Tensor,
    rotary_cos: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError on the CPU, as the CPU's kernel does; on a GPU indexing out of range stops the program."""
    if cache_lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    blocks, page_size = key_cache.shape[:2]
    for b, (cached, first) in enumerate(zip(cache_lengths.tolist(), first_seen.tolist(), strict=True)):
        length = cached + added
        if cached < 0 or length > capacity:
            raise ValueError(f"cache_lengths[{b}]: expected a number from 0 to {capacity - added}, got {cached}")
        if rotary_cos is not None and length > rotary_cos.shape[0]:
            raise ValueError(f"rotary_cos: expected at least {length} positions, got {rotary_cos.shape[0]}")
        if block_table is not None and length > first:
            used = block_table[b, first // page_size : (length - 1) // page_size + 1]
            if used.min() < 0 or used.max() >= blocks:
                raise ValueError(f"block_table[{b}]: expected block numbers below {blocks}, got {used.tolist()}")
