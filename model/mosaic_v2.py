"""Memory Mosaics, second version: Zhang and Bottou, "Memory Mosaics at Scale" (arXiv 2507.03285).

Where the description leaves a choice: every memory, short-term and long-term, has all its parameters to itself, the
bandwidth's too; gates, decays, bandwidths, mixes and value scales are one per head; values are normalised, then scaled;
norms are LayerNorms without bias before each sublayer, and no linear layer has a bias; d in the initial standard
deviation is the number of a matrix's inputs and l, from 0, the block; embedding and head have 1 / sqrt(d), without l; a
pass over whole sequences in training draws one delay for all its blocks.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.arithmetic import compute_dtype, unit
from model.cache import MemoryBatch
from model.cached_past_v2 import CachedStepV2
from model.config import MosaicV2Config
from model.layers import LayerNorm, Linear, MixedValues, split_heads
from model.network import MosaicNetwork
from model.past_v2 import Memory, ParallelPastV2, PastV2

LOG_BETA_MAX, LOG_VALUE_SCALE_MAX = 10.0, 15.0


class GatedKeyExtractor(nn.Module):
    """Unit keys: the direction of a sum of projected inputs that each token gates and fades by itself."""

    def __init__(self, config: MosaicV2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.projection = Linear(config.n_embd, config.n_embd, bias=False)
        self.gate = Linear(config.n_embd, config.n_head, bias=False)
        self.decay = Linear(config.n_embd, config.n_head, bias=False)

    def forward(self, x: Tensor, past: PastV2, memory: Memory) -> Tensor:
        """[*tokens, n_embd] -> unit keys [*tokens, heads, dim]."""
        projected = split_heads(self.projection(x), self.n_head)
        # These are exponentiated, and decays added up over the whole past: 16 bits would not do.
        with torch.autocast(x.device.type, enabled=False):
            log_gate, log_decay = self.gate(x), -self.decay(x).abs()
        return unit(past.average(projected, log_gate, log_decay, memory), 0.0)


class Bandwidth(nn.Module):
    """The kernel's sharpness, which grows with the number of pairs: beta_1 n^alpha + beta_0 per head."""

    def __init__(self, config: MosaicV2Config) -> None:
        super().__init__()
        self.log_beta0, self.log_beta1, self.alpha = (nn.Parameter(torch.empty(config.n_head)) for _ in range(3))

    def forward(self, num_pairs: Tensor, dtype: torch.dtype) -> Tensor:
        """[*tokens] integers -> [*tokens, heads, 1]. What it says of no pairs at all does not matter."""
        log_n = num_pairs.clamp(min=1).to(dtype).log().unsqueeze(-1)
        beta0, beta1, alpha = self.values(dtype)
        return (beta1 * torch.exp(alpha * log_n) + beta0).unsqueeze(-1)

    def values(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """beta_0, beta_1 and alpha, [heads] each."""
        beta0, beta1 = (b.to(dtype).clamp(max=LOG_BETA_MAX).exp() for b in (self.log_beta0, self.log_beta1))
        return beta0, beta1, self.alpha.to(dtype).abs().clamp(max=1)


class ContextualMemoryV2(nn.Module):
    """One memory of this sequence, without the matrix that follows it."""

    def __init__(self, config: MosaicV2Config, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.key = GatedKeyExtractor(config)
        self.value = MixedValues(config.n_embd, config.n_head, bias=False)
        self.bandwidth = Bandwidth(config)

    def forward(self, x: Tensor, past: PastV2) -> Tensor:
        """[*tokens, n_embd] -> what was read, [*tokens, n_embd]."""
        key = self.key(x, past, self.memory)
        own, earlier = self.value(x)
        completed_value = unit(past.previous_contribution(own, self.memory) + earlier, 0.0)
        query = key * self.bandwidth(past.num_visible(self.memory), x.dtype)
        y = past.read(query, past.previous_key(key, self.memory), completed_value, self.memory)
        scale = self.value.log_scale.to(x.dtype).abs().clamp(max=LOG_VALUE_SCALE_MAX).exp()
        return (y * scale[:, None]).flatten(-2)


class ContextualMemories(nn.Module):
    """Short-term and long-term memory side by side, and the matrix that joins what they read."""

    def __init__(self, config: MosaicV2Config) -> None:
        super().__init__()
        self.short = ContextualMemoryV2(config, Memory.SHORT)
        self.long = ContextualMemoryV2(config, Memory.LONG)
        self.output = Linear(2 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, past: PastV2) -> Tensor:
        """[*tokens, n_embd] -> [*tokens, n_embd]."""
        remembered: Tensor = self.output(torch.cat([self.short(x, past), self.long(x, past)], -1))
        return remembered


class GatedPersistentMemory(nn.Module):
    """The memory learned in training: W_2 (SiLU(W_1 x) * W_3 x), here `down`, `gate` and `up`."""

    def __init__(self, config: MosaicV2Config) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, config.persistent_size, bias=False)
        self.up = Linear(config.n_embd, config.persistent_size, bias=False)
        self.down = Linear(config.persistent_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[*tokens, n_embd] -> [*tokens, n_embd]."""
        remembered: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return remembered


class BlockV2(nn.Module):
    """Contextual and persistent memories, each behind a norm and added to the stream."""

    def __init__(self, config: MosaicV2Config) -> None:
        super().__init__()
        self.contextual_norm = LayerNorm(config.n_embd, bias=False)
        self.contextual = ContextualMemories(config)
        self.persistent_norm = LayerNorm(config.n_embd, bias=False)
        self.persistent = GatedPersistentMemory(config)

    def forward(self, x: Tensor, past: PastV2) -> Tensor:
        """[*tokens, n_embd] -> [*tokens, n_embd]."""
        x = x + self.contextual(self.contextual_norm(x), past)
        persistent: Tensor = self.persistent(self.persistent_norm(x))
        return x + persistent


class MemoryMosaicV2(MosaicNetwork):
    """A network of blocks with a short-term, a long-term and a persistent memory."""

    config: MosaicV2Config
    PRECISE: ClassVar[tuple[str, ...]] = (
        ".log_beta0", ".log_beta1", ".alpha", ".log_scale", ".mix", ".key.gate.weight", ".key.decay.weight",
    )  # fmt: skip

    def __init__(self, config: MosaicV2Config) -> None:
        super().__init__(config, (BlockV2(config) for _ in range(config.n_layer)))
        if self.embedding.weight.device.type != "meta":
            self._initialise()

    def _whole_past(self, token_ids: Tensor) -> ParallelPastV2:
        c, delay = self.config, self.config.long_delay
        if self.training:
            delay = int(torch.randint(c.long_delay, c.max_train_delay + 1, ()))
        return ParallelPastV2(token_ids, window=c.short_window, delay=delay)

    def _cached_step(self, batch: MemoryBatch) -> CachedStepV2:
        return CachedStepV2(batch, self.config, compute_dtype(self.dtype))

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            kind = name.rpartition(".")[2]
            if kind in ("log_beta0", "log_beta1"):
                parameter.fill_(1.5)
            elif kind == "alpha":
                parameter.fill_(1 / 3)
            elif kind == "log_scale":
                parameter.zero_()
            elif kind == "mix":
                parameter.uniform_(0, 1)
            elif "norm." in name:
                parameter.fill_(1)
            else:
                inputs = parameter.shape[1]
                layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
                std = 1 / math.sqrt(inputs if layer is None else 2 * inputs * (layer + 1))
                nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std)
