"""Transformer layers and stacks in the place of torch.nn's: the same constructors, state_dict, results and exceptions.

They are torch's own classes with lmengine's attention and linear layers in them, and without torch's fused path, which
would take the weights in evaluation and call none of these.

N: batch, S: source length, T: target length, E: d_model, H: nhead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmengine.nn.attention import MultiheadAttention, keep_from_fused_path
from lmengine.nn.linear import Linear

Activation = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on lmengine's kernels, in training and in evaluation.

    Nested tensors are not supported. Masks and is_causal are as in `lmengine.nn.MultiheadAttention`.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as torch's.

    Raises:
        ValueError, AssertionError, RuntimeError: as torch.nn.TransformerEncoderLayer.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        use_our_parts(self)
        self.activation_relu_or_gelu = 0  # so that a torch.nn.TransformerEncoder makes no nested tensors for it

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, of the source's shape.

        Args:
            src: (S, N, E), or (N, S, E) with batch_first, or (S, E).
            src_mask: (S, S) or (N * H, S, S): bool, True where the query does not see the key, or floating, added.
            src_key_padding_mask: (N, S) or (S,), likewise.
            is_causal: says that src_mask is the causal mask.
        """
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on lmengine's kernels.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as torch's.

    Raises:
        ValueError, AssertionError, RuntimeError: as torch.nn.TransformerDecoderLayer.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        use_our_parts(self)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: copies of a layer, one behind the other.

    Args:
        encoder_layer: a TransformerEncoderLayer; a layer of torch's stays torch's.
        num_layers, norm: as torch's.
        enable_nested_tensor, mask_check: accepted. In torch they decide whether a padded batch is packed in evaluation,
            after which padding holds zeros; here a batch is never packed, and padding holds what the layers made of it,
            as it does in torch while gradients are computed.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The last layer's output, of the source's shape.

        Args:
            src, mask, src_key_padding_mask: as in TransformerEncoderLayer.
            is_causal: says that mask is the causal mask; looked up in the mask where None, unless compiling.
        """
        is_causal = is_causal_mask(mask, is_causal, src, self.layers)
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: copies of a layer, one behind the other.

    Args:
        decoder_layer: a TransformerDecoderLayer; a layer of torch's stays torch's.
        num_layers, norm: as torch's.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The last layer's output, of the target's shape.

        Args:
            tgt: (T, N, E), or (N, T, E) with batch_first, or (T, E).
            memory: the encoder's output: (S, N, E), or (N, S, E) with batch_first, or (S, E).
            tgt_mask: (T, T) or (N * H, T, T).
            memory_mask: (T, S) or (N * H, T, S).
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S), or (T,) and (S,).
            tgt_is_causal: says that tgt_mask is the causal mask; looked up in the mask where None, unless compiling.
            memory_is_causal: says that memory_mask is the causal mask.
        """
        tgt_is_causal = is_causal_mask(tgt_mask, tgt_is_causal, tgt, self.layers)
        return super().forward(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
            memory_is_causal,
        )  # fmt: skip


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer` (Vaswani et al. 2017) on lmengine's kernels.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, custom_encoder,
            custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as torch's.

    Raises:
        ValueError, AssertionError, RuntimeError: as torch.nn.Transformer.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if custom_encoder is None:
            norm = torch.nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **made)
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*layer, **made), num_encoder_layers, norm)
        if custom_decoder is None:
            norm = torch.nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **made)
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*layer, **made), num_decoder_layers, norm)
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip


def use_our_parts(layer: torch.nn.Module) -> None:
    """Give attention and linear layers right below `layer` our classes: they differ from torch's in `forward` alone."""
    for part in layer.children():
        if type(part) is torch.nn.MultiheadAttention:
            part.__class__ = MultiheadAttention
            keep_from_fused_path(part)
        elif type(part) is torch.nn.Linear:
            part.__class__ = Linear


def is_causal_mask(mask: Tensor | None, is_causal: bool | None, x: Tensor, layers: torch.nn.ModuleList) -> bool:
    """What is_causal says, or where it is None whether the mask is the causal mask of x's length."""
    if is_causal is not None:
        return is_causal
    if mask is None or torch.compiler.is_compiling():  # a compiled graph cannot depend on what is in a mask
        return False
    batch_first = layers[0].self_attn.batch_first  # type: ignore[union-attr]
    length = x.shape[-2 if batch_first or x.dim() == 2 else 0]
    if mask.shape != (length, length):
        return False
    hidden = torch.ones_like(mask, dtype=torch.bool).triu(1)
    causal = hidden if mask.dtype == torch.bool else torch.zeros_like(mask).masked_fill(hidden, -torch.inf)
    return torch.equal(mask, causal)
