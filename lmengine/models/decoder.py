"""A Transformer decoder as GPT-2 has it (Radford et al. 2019): learned positions, norms before the blocks, GELU.

B: batch, T: length, V: vocabulary_size, E: embedding_dim, N: heads, D: head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmengine import nn
from lmengine.models.language_model import LanguageModel


@dataclass(frozen=True)
class DecoderConfig:
    vocabulary_size: int
    embedding_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    context: int = 128
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.embedding_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embedding_dim = {self.embedding_dim}, got {self.num_heads}"
            )


class Decoder(LanguageModel):
    """A language model on `lmengine.nn.functional.scaled_dot_product_attention`.

    Args:
        config: sizes. `dropout` is applied to the embeddings and to what each block adds.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.vocabulary_size, config.embedding_dim)
        self.config = config
        self.context = config.context
        self.positions = torch.nn.Parameter(torch.randn(config.context, config.embedding_dim) * 0.02)
        self.blocks = torch.nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = torch.nn.LayerNorm(config.embedding_dim)

    def features(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens: expected at most context = {self.config.context} of them, got {length}")
        x = F.dropout(self.embedding(tokens) + self.positions[:length], self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)  # (B, T, E)
        return self.norm(x)


class Block(torch.nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.attention_norm = torch.nn.LayerNorm(dim)
        self.attention_in = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = torch.nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)
        for layer in (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out):
            torch.nn.init.normal_(layer.weight, std=dim**-0.5)
            torch.nn.init.zeros_(layer.bias)
        for layer in (self.attention_out, self.mlp_out):  # 2 * num_layers of these add up
            layer.weight.data *= (2 * config.num_layers) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        projected = self.attention_in(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, N, T, D) each
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, dim)
        x = x + F.dropout(self.attention_out(attended), self.dropout, self.training)
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)
