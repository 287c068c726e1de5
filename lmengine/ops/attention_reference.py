"""The reference of attention: plain PyTorch with all scores in memory, the definition of right.

B: batch, N: heads, M: heads of keys and values, Q: query length, K: key length, D: head_dim, E: the values' head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    prefix_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Q, E) and logsumexp (B, N, Q) of `attention`'s arguments, differentiable any number of times."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        outputs, sums = [query.new_empty(1, query.shape[1], 0, value.shape[3])], [query.new_empty(1, query.shape[1], 0)]
        for b in range(len(starts_q) - 1):
            q = query[:, :, starts_q[b] : starts_q[b + 1]]
            k, v = (tensor[:, :, starts_k[b] : starts_k[b + 1]] for tensor in (key, value))
            prefix, lengths = (t if t is None else t[b : b + 1] for t in (prefix_lengths, key_lengths))
            slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b : b + 1]
            output, logsumexp = one_length(
                q, k, v, is_causal, scale, None, window_size, bottom_right, prefix, lengths, slopes, softcap,
                dropout_p, seed, b,
            )  # fmt: skip
            outputs.append(output)
            sums.append(logsumexp)
        return torch.cat(outputs, 2), torch.cat(sums, 2)
    return one_length(
        query, key, value, is_causal, scale, mask, window_size, bottom_right, prefix_lengths, key_lengths,
        alibi_slopes, softcap, dropout_p, seed, 0,
    )  # fmt: skip


def one_length(
    query, key, value, is_causal, scale, mask, window_size, bottom_right, prefix_lengths, key_lengths, alibi_slopes,
    softcap, dropout_p, seed, first_batch,
):  # fmt: skip
    """Attention of sequences of one length; `first_batch` is the number of the first, for dropout."""
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = scale * query @ key.transpose(-1, -2)  # (B, N, Q, K)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    distance, limits = distances(scores, bottom_right, key_lengths)
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        scores = scores - slopes[:, :, None, None].to(scores.dtype) * distance.abs()
    seen = visible(distance, limits, is_causal, window_size, prefix_lengths)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    scores = scores.masked_fill(~seen, -torch.inf)
    some = (scores != -torch.inf).any(-1)  # a query that sees no key: 0, and -infinity
    scores = torch.where(some[..., None], scores, 0)
    weights = scores.softmax(-1) if scores.shape[-1] else scores
    weights = torch.where(some[..., None], weights, 0)
    if dropout_p:
        assert seed is not None
        kept = dropout_kept(seed, weights.shape, dropout_p, first_batch)
        weights = torch.where(kept, weights * (0 if dropout_p == 1 else 1 / (1 - dropout_p)), 0)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    logsumexp = torch.where(some, wide.logsumexp(-1), -torch.inf)
    return weights @ value, logsumexp


def distances(scores: Tensor, bottom_right: bool, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The key's position minus the query's (B or 1, 1, Q, K), and each sequence's key length (B or 1, 1, 1, 1)."""
    queries, keys = scores.shape[-2:]
    device = scores.device
    lengths = torch.full((1, 1, 1, 1), keys, device=device)
    if key_lengths is not None:
        lengths = key_lengths.long().clamp(0, keys)[:, None, None, None]
    positions = torch.arange(queries, device=device)[:, None] + (lengths - queries if bottom_right else 0)
    return torch.arange(keys, device=device) - positions, lengths


def visible(
    distance: Tensor, lengths: Tensor, is_causal: bool, window_size: tuple[int, int], prefix_lengths: Tensor | None
) -> Tensor:
    """Which keys a query sees: (B or 1, 1, Q, K)."""
    left, right = window_size
    if is_causal:
        right = 0 if right < 0 else min(right, 0)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    keys = torch.arange(distance.shape[-1], device=distance.device)
    if prefix_lengths is not None:
        seen = seen | (keys < prefix_lengths[:, None, None, None])
    return seen & (keys < lengths)


def dropout_kept(seed: Tensor, shape: torch.Size, dropout_p: float, first_batch: int = 0) -> Tensor:
    """Which weights of (B, N, Q, K) dropout keeps: Philox 4x32 with 7 rounds (Salmon et al. 2011).

    Weight (b, n, i, j) is kept where word j % 4 of the block with counter (j // 4, i, low and high half of b * N + n)
    and the seed as its key is at least dropout_p * 2^32.
    """
    batch, heads, queries, keys = shape
    low = 0xFFFFFFFF

    def numbers(count):
        return torch.arange(count, device=seed.device)

    head = (first_batch + numbers(batch))[:, None] * heads + numbers(heads)  # (B, N)
    zeros = torch.zeros(batch, heads, queries, (keys + 3) // 4, dtype=torch.long, device=seed.device)
    c0 = zeros + numbers((keys + 3) // 4)
    c1 = zeros + numbers(queries)[:, None]
    c2 = zeros + (head & low)[..., None, None]
    c3 = zeros + (head >> 32)[..., None, None]
    k0, k1 = seed.reshape(()) & low, (seed.reshape(()) >> 32) & low
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64, and shifts fill with the sign
        c0, c1 = ((b >> 32) & low) ^ c1 ^ k0, b & low
        c2, c3 = ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([c0, c1, c2, c3], -1).flatten(-2)[..., :keys]
    return words >= min(int(dropout_p * 2**32), low)
