"""Memory Mosaics, first version (arXiv 2405.06394): embedding, blocks of two memories, head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.arithmetic import compute_dtype
from model.config import MosaicConfig
from model.layers import Block, LayerNorm, Linear
from model.past import ParallelPast


class MemoryMosaic(nn.Module):
    """A language model of associative memories.

    Without a cache it maps whole sequences to logits and trains; with one it maps the next tokens of many sequences,
    one or several each, and updates the cache. Both forms run the same layers.
    """

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = ""
        """Hexadecimal sha256 of configuration and weights file; empty for a model that was not loaded from one."""
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config)
        self.head = None if config.tied else Linear(config.n_embd, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of variance 1/fan-in, what adds to the stream divided by the depth, as published."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_in = module.in_features * (2 if name.endswith(("value.current", "value.next")) else 1)
                fan_in *= self.config.n_layer if name.endswith(".output") else 1
                nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(self.config.n_embd) if self.config.tied else 1.0)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weight matrices."""
        return self.embedding.weight.dtype

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def cast_weights(self, dtype: torch.dtype) -> MemoryMosaic:
        """Stores the weights as `dtype`, except the few that set a scale, a decay or a norm: float32 at least."""
        self.to(compute_dtype(dtype))
        for name, parameter in self.named_parameters():
            if not _is_precise(name):
                parameter.data = parameter.data.to(dtype)
        return self

    def forward(self, token_ids: Tensor) -> Tensor:
        """[batch, time] int64 -> logits [batch, time, vocab_size]."""
        x = self._embed(token_ids)
        for block in self.blocks:
            x = block(x, ParallelPast())
        return self._logits(x)

    def _embed(self, token_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(token_ids)
        return x.to(compute_dtype(self.dtype))

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(x.to(weight.dtype), weight).to(x.dtype) * self.config.logit_scale


def _is_precise(name: str) -> bool:
    return name.endswith((".leak", ".log_scale", ".mix")) or "norm." in name
