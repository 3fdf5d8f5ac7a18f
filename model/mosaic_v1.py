"""Memory Mosaics, first version (arXiv 2405.06394): embedding, blocks of two memories, head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.arithmetic import compute_dtype
from model.cache import MemoryBatch
from model.cached_past import CachedStep
from model.config import MosaicConfig
from model.initialise import initialise
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
        self.embedding = nn.Embedding(
            config.vocab_size, config.n_embd, _weight=torch.empty(config.vocab_size, config.n_embd)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config)
        self.head = None if config.tied else Linear(config.n_embd, config.vocab_size, bias=False)
        # On the meta device values would be drawn for nothing, and the draws would import torch's compiler.
        if self.embedding.weight.device.type != "meta":
            initialise(self, config)

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

    def forward(self, token_ids: Tensor, cache: MemoryBatch | None = None, *, all_logits: bool = False) -> Tensor:
        """Logits of the token after each token, float32 (float64 for a float64 model).

        Without a cache: token_ids [batch, time] int64 -> [batch, time, vocab_size].
        With one: token_ids [tokens] int64, the batch's sequences one after another -> [sequences, vocab_size], after
        the last token of each, or with `all_logits` [tokens, vocab_size]. Absorbs the tokens into the cache; an
        exception leaves every sequence as it was. Without gradients.
        Raises ValueError if token_ids has another shape.
        """
        if cache is not None:
            return self._step(token_ids, cache, all_logits=all_logits)
        if token_ids.ndim != 2 or token_ids.shape[1] == 0:
            raise ValueError(f"token_ids: expected [batch, time] with a token at least, got {list(token_ids.shape)}")
        x = self._embed(token_ids)
        past = ParallelPast()
        for block in self.blocks:
            x = block(x, past)
        return self._logits(x)

    @torch.no_grad()
    def _step(self, token_ids: Tensor, batch: MemoryBatch, *, all_logits: bool) -> Tensor:
        if token_ids.shape != (batch.num_tokens,):
            raise ValueError(f"token_ids: expected [{batch.num_tokens}], got {list(token_ids.shape)}")
        step = CachedStep(batch, self.config, compute_dtype(self.dtype))
        x = self._embed(token_ids[step.plan.order])
        for layer, block in enumerate(self.blocks):
            x = block(x, step.past(layer))
        step.commit()
        wanted = step.plan.order if all_logits else step.plan.sequences
        logits = self._logits(x if all_logits else x[step.plan.last])
        return torch.empty_like(logits).index_copy_(0, wanted, logits)

    def _embed(self, token_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(token_ids)
        return x.to(compute_dtype(self.dtype))

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(x.to(weight.dtype), weight).to(x.dtype) * self.config.logit_scale


def _is_precise(name: str) -> bool:
    return name.endswith((".leak", ".log_scale", ".mix")) or "norm." in name
