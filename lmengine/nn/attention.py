"""Multi-head attention in the place of torch.nn's: the same constructor, state_dict, results and exceptions.

N: batch, L: query length, S: key length, E: embed_dim, H: heads, D: head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmengine.nn.functional import scaled_dot_product_attention
from lmengine.ops.matmul import linear


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on lmengine's kernels; takes its arguments, its state_dict and its inputs.

    Inside of a torch.nn.TransformerEncoderLayer it does the attention in training and in evaluation: a forward
    pre-hook that does nothing keeps that layer from its fused path, which would take the weights and never call here.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as torch's.
        dropout: may be above 0, but only evaluation is implemented then.
        add_bias_kv, add_zero_attn: must be False; they are not implemented.

    Raises:
        NotImplementedError: an argument that is not implemented; the message names it.
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
        for name, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise NotImplementedError(f"{name}: expected False (not implemented), got {given}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.register_forward_pre_hook(_no_fused_layer)

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
            key_padding_mask: not implemented, must be None.
            need_weights: return the weights as well. It is what torch's layer does by default, and costs the matrix of
                all scores in time and memory: the kernel has none.
            attn_mask: None or, together with is_causal, the causal mask: (L, S) or (N * H, L, S), bool or float.
            average_attn_weights: the weights' mean over the heads, not each head's.
            is_causal: says, and is trusted to say, that attn_mask is the causal mask.

        Returns:
            attn_output, of the query's shape; and None or the weights, (N, L, S), or (N, H, L, S) without
            average_attn_weights, less N where there is no batch.

        Raises:
            NotImplementedError: an argument that is not implemented; the message names it.
            RuntimeError, AssertionError: as torch.nn.MultiheadAttention.
        """
        self._check(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        batch_dim = 0 if self.batch_first or query.dim() == 2 else 1
        batched = query.dim() == 3
        q, k, v = (heads.transpose(1, 2) for heads in self._project(query, key, value, batch_dim, batched))

        weights = None
        if need_weights:
            attended, weights = self._attend_with_weights(q, k, v, attn_mask)  # (N, H, L, D), (N, H, L, S)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = scaled_dot_product_attention(q, k, v, is_causal=is_causal)  # (N, H, L, D)
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

    def _attend_with_weights(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The plain way, by the matrix of all scores."""
        batch, heads = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q * self.head_dim**-0.5, k, v))
        if attn_mask is None:
            scores = q @ k.transpose(1, 2)  # (N * H, L, S)
        else:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, -torch.inf)
            scores = torch.baddbmm(attn_mask, q, k.transpose(1, 2))
        weights = scores.softmax(-1)
        return (weights @ v).unflatten(0, (batch, heads)), weights.unflatten(0, (batch, heads))

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raise what torch's layer raises, in its words, then NotImplementedError for what is not implemented."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError("query, key, value: nested tensors are not implemented")
        if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise AssertionError("only bool and floating types of attn_mask are supported")
        self._check_dims(query, key, value, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        self._check_shapes(query, key, value, attn_mask if need_weights else None)
        if key_padding_mask is not None:
            raise NotImplementedError("key_padding_mask: expected None (not implemented)")
        if attn_mask is not None and not is_causal:
            raise NotImplementedError(
                "attn_mask: expected None, or the causal mask together with is_causal=True (others are not implemented)"
            )
        if self.training and self.dropout > 0:
            raise NotImplementedError(f"dropout: expected 0 while training (not implemented), got {self.dropout}")

    def _check_dims(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
        dim = query.dim()
        if dim not in (2, 3):
            raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {dim}-D query tensor")
        what = "batched (3-D)" if dim == 3 else "unbatched (2-D)"
        if key.dim() != dim or value.dim() != dim:
            raise AssertionError(
                f"For {what} `query`, expected `key` and `value` to be {dim}-D"
                f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
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

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
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

    def _length_first(self, x: Tensor) -> torch.Size:
        """x's shape as (length, N, features)."""
        if x.dim() == 2:
            return torch.Size((x.shape[0], 1, x.shape[1]))
        return torch.Size((x.shape[1], x.shape[0], x.shape[2])) if self.batch_first else x.shape


def _no_fused_layer(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook; torch.nn.TransformerEncoderLayer calls each of its parts as soon as one has a hook."""
