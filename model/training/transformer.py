"""A transformer in the manner of GPT-2, to compare a Memory Mosaic with. It is trained, never served."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Sizes, with the names that a Memory Mosaic's have. Raises ValueError, naming the field, on nonsense."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    """Positions that have an embedding: it can see no further."""
    eos_token_id: int | None = None
    architecture: str = "transformer"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a number of 1 or more, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: {self.n_embd} cannot be divided among n_head = {self.n_head} heads")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError on an unknown, a missing or a bad field."""
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown field {unknown[0]!r}")
        try:
            return cls(**values)
        except TypeError:
            missing = {"n_layer", "n_head", "n_embd"} - set(values)
            raise ValueError(f"missing field {min(missing)!r}") from None


class Transformer(nn.Module):
    """Pre-LN, learned positions, GELU, tied head, no biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                depth = 2 * config.n_layer if name.endswith("output.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))

    def forward(self, token_ids: Tensor) -> Tensor:
        """[batch, time] int64 -> logits [batch, time, vocab_size]."""
        x = self.embedding(token_ids) + self.positions.weight[: token_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight).float()


class TransformerBlock(nn.Module):
    """Causal attention and a feed-forward network of four times the width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention_input = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.LayerNorm(width, bias=False)
        self.feed_input = nn.Linear(width, 4 * width, bias=False)
        self.feed_output = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, n_embd] -> [batch, time, n_embd]."""
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for part in self.attention_input(self.attention_norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_output(y.transpose(1, 2).flatten(-2))
        fed: Tensor = self.feed_output(F.gelu(self.feed_input(self.feed_norm(x))))
        return x + fed
