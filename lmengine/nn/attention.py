"""Multi-head attention in the place of torch.nn's: the same constructor, state_dict, results and exceptions.

N: batch, L: query length, S: key length, E: embed_dim, H: heads, D: head_dim.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmengine.ops.attention import attention
from lmengine.ops.matmul import linear


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on lmengine's kernels; takes its arguments, its state_dict and its inputs.

    Two things differ from torch. A query that sees no key gives 0 and weights of 0, also with need_weights, where
    torch gives NaN. With dropout and without need_weights the kernel draws which weights are dropped: as many, and the
    same again from the same seed, but others than torch.

    Inside of a torch.nn.TransformerEncoderLayer it does the attention in training and in evaluation: a forward
    pre-hook that does nothing keeps that layer from its fused path, which would take the weights and never call here.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch's.

    Raises:
        ValueError, AssertionError: as torch.nn.MultiheadAttention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        keep_from_fused_path(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the query to the key and value.

        Args:
            query: (L, N, E), or (N, L, E) with batch_first, or (L, E).
            key: (S, N, kdim), or (N, S, kdim) with batch_first, or (S, kdim).
            value: (S, N, vdim), or (N, S, vdim) with batch_first, or (S, vdim).
            key_padding_mask: (N, S), or (S,) where there is no batch: bool, True for a key that no query sees, or
                floating, added to the scores.
            need_weights: return the weights as well. It is what torch's layer does by default, and costs the matrix of
                all scores in time and memory: the kernel has none.
            attn_mask: (L, S) or (N * H, L, S): bool, True where the query does not see the key, or floating, added to
                the scores.
            average_attn_weights: the weights' mean over the heads, not each head's.
            is_causal: says, and is trusted to say, that attn_mask is the causal mask, which is then not read unless
                need_weights.

        Returns:
            attn_output, of the query's shape; and None or the weights, (N, L, S), or (N, H, L, S) without
            average_attn_weights, less N where there is no batch. S counts a key of add_bias_kv and of add_zero_attn.

        Raises:
            NotImplementedError: nested tensors.
            RuntimeError, AssertionError: as torch.nn.MultiheadAttention.
        """
        added = (self.bias_k is not None) + self.add_zero_attn
        hint = is_causal and not need_weights
        if hint and key_padding_mask is not None:  # torch reads the mask then: it tells of the added keys, or learns
            hint = not added and attn_mask is not None and not attn_mask.requires_grad
        read_mask = None if hint else attn_mask
        self._check(query, key, value, key_padding_mask, attn_mask, read_mask, is_causal)

        batched = query.dim() == 3
        batch_dim = 0 if self.batch_first or not batched else 1
        q, k, v = self._project(query, key, value, batch_dim, batched)
        if added:
            k, v = self._with_added_keys(k, self.bias_k), self._with_added_keys(v, self.bias_v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (N, H, length, D)
        mask = self._merged_mask(read_mask, key_padding_mask, q, added)
        dropout_p = self.dropout if self.training else 0.0

        weights = None
        if need_weights:
            attended, weights = attend_with_weights(q, k, v, mask, dropout_p)  # (N, H, L, D), (N, H, L, S)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = attention(q, k, v, hint, mask=mask, dropout_p=dropout_p)  # (N, H, L, D)
        merged = attended.transpose(1, 2).flatten(2)  # (N, L, E)
        merged = merged.transpose(0, batch_dim) if batched else merged.squeeze(0)
        return linear(merged, self.out_proj.weight, self.out_proj.bias), weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads: (N, length, H, D) each."""
        heads = (self.num_heads, self.head_dim)
        bias = self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            packed = linear(query, self.in_proj_weight, bias).unflatten(-1, (3, *heads))
            parts = packed.unbind(-3)
        else:
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            inputs = (query, key, value)
            parts = tuple(
                linear(x, weight, bias).unflatten(-1, heads)
                for x, weight, bias in zip(inputs, weights, biases, strict=True)
            )
        q, k, v = (part.transpose(0, batch_dim) if batched else part.unsqueeze(0) for part in parts)
        return q, k, v

    def _with_added_keys(self, heads: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values (N, S, H, D), and behind them the learned one and the zero."""
        one = (heads.shape[0], 1, *heads.shape[2:])
        parts = [heads]
        if bias is not None:
            parts.append(bias.to(heads.dtype).view(1, *one[1:]).expand(one))
        if self.add_zero_attn:
            parts.append(heads.new_zeros(one))
        return torch.cat(parts, 1)

    def _merged_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, added: int
    ) -> Tensor | None:
        """Both masks in one that broadcasts to (N, H, L, S): bool, True where the query sees the key, or added."""
        batch, heads, length, _ = q.shape
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(batch, heads, length, -1))
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(batch, 1, 1, -1))
        if not masks:
            return None
        if added:
            masks = [F.pad(mask, (0, added)) for mask in masks]
        if all(mask.dtype == torch.bool for mask in masks):
            return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        masks = [additive(mask, q.dtype) for mask in masks]
        return masks[0] if len(masks) == 1 else masks[0] + masks[1]

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        read_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raise what torch's layer raises, in its words."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError(
                "query, key, value: nested tensors are not implemented (a torch.nn.TransformerEncoder makes them unless "
                "it has enable_nested_tensor=False)"
            )
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported")
        if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=3,
            )
        self._check_dims(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        self._check_shapes(query, key, value, key_padding_mask, read_mask)

    def _check_dims(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        dim = query.dim()
        if dim not in (2, 3):
            raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {dim}-D query tensor")
        what = "batched (3-D)" if dim == 3 else "unbatched (2-D)"
        if key.dim() != dim or value.dim() != dim:
            raise AssertionError(
                f"For {what} `query`, expected `key` and `value` to be {dim}-D"
                f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
            )
        if key_padding_mask is not None and key_padding_mask.dim() != dim - 1:
            raise AssertionError(
                f"For {what} `query`, expected `key_padding_mask` to be `None` or {dim - 1}-D"
                f" but found {key_padding_mask.dim()}-D tensor instead"
            )
        if attn_mask is not None and attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"For {what} `query`, expected `attn_mask` to be `None`, 2-D or 3-D"
                f" but found {attn_mask.dim()}-D tensor instead"
            )
        if attn_mask is not None and dim == 2 and attn_mask.dim() == 3:
            scores = (self.num_heads, query.shape[0], key.shape[0])
            if attn_mask.shape != scores:
                raise AssertionError(f"Expected `attn_mask` shape to be {scores} but got {attn_mask.shape}")

    def _check_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        q, k, v = (self._length_first(x) for x in (query, key, value))
        if q[2] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {q[2]}")
        if self.in_proj_weight is None:
            if k[:2] != v[:2]:
                raise AssertionError(f"key's sequence and batch dims {k[:2]} do not match value's {v[:2]}")
            for name, shape, weight in (("key", k, self.k_proj_weight), ("value", v, self.v_proj_weight)):
                if shape[2] != weight.shape[1]:
                    wanted = (self.embed_dim, shape[2])
                    raise AssertionError(f"expecting {name} weights shape of {wanted}, but got {weight.shape}")
        elif k != v:
            raise AssertionError(f"key shape {k} does not match value shape {v}")
        elif k[2] != self.embed_dim:
            raise RuntimeError(f"key: expected embed_dim = {self.embed_dim} features, got {k[2]}")
        if k[1] != q[1]:
            raise RuntimeError(f"key: expected the query's batch {q[1]}, got {k[1]}")
        if attn_mask is not None:
            scores = (q[0], k[0]) if attn_mask.dim() == 2 else (q[1] * self.num_heads, q[0], k[0])
            if attn_mask.shape != scores:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {scores}."
                )
        if key_padding_mask is not None:
            shape = key_padding_mask.shape if key_padding_mask.dim() == 2 else (1, *key_padding_mask.shape)
            for i, size in enumerate((q[1], k[0])):
                if shape[i] != size:
                    raise AssertionError(f"Expected key_padded_mask.shape[{i}] to be {size}, but got {shape[i]}")

    def _length_first(self, x: Tensor) -> torch.Size:
        """x's shape as (length, N, features)."""
        if x.dim() == 2:
            return torch.Size((x.shape[0], 1, x.shape[1]))
        return torch.Size((x.shape[1], x.shape[0], x.shape[2])) if self.batch_first else x.shape


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores of dtype: -infinity for True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    return mask


def attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """The plain way, by the matrix of all scores: the output (N, H, L, D), and the weights (N, H, L, S) with dropout."""
    batch, heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    if mask is None:
        weights = (q @ k.transpose(1, 2)).softmax(-1)  # (N * H, L, S)
    else:
        if mask.dtype == torch.bool:
            mask = additive(~mask, q.dtype)
        scores = torch.baddbmm(mask.expand(batch, heads, -1, -1).flatten(0, 1), q, k.transpose(1, 2))
        hidden = (scores == -torch.inf).all(-1, keepdim=True)  # a query that sees no key
        weights = scores.masked_fill_(hidden, 0).softmax(-1).masked_fill(hidden, 0)
    weights = F.dropout(weights, dropout_p)
    return (weights @ v).unflatten(0, (batch, heads)), weights.unflatten(0, (batch, heads))


def keep_from_fused_path(layer: torch.nn.MultiheadAttention) -> None:
    """Have a torch.nn.TransformerEncoderLayer call each of its parts, as it does as soon as one of them has a hook."""
    layer.register_forward_pre_hook(_nothing)


def _nothing(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    pass
