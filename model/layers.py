"""The parts of a Memory Mosaic: norms, feature extractors, contextual and persistent memory.

Weights may be of a narrow type; whatever is normalised, exponentiated or averaged is computed in the type of the
activations, float32 (float64 for float64 weights). Trained logit scales exceed 100, where bfloat16 would err by 0.3.
Equation numbers follow arXiv 2405.06394.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.arithmetic import read, unit
from model.config import MosaicConfig
from model.past import Average, Past

# The published scalars are stored divided by this, so that one learning rate suits them and the weights.
_STORED = 10.0


class LayerNorm(nn.LayerNorm):
    """Layer norm with epsilon 1e-5 and an optional bias, over [..., n_embd]."""

    def __init__(self, n_embd: int, *, bias: bool) -> None:
        super().__init__(n_embd, eps=1e-5, bias=bias)


class Linear(nn.Linear):
    """A linear layer whose input and output keep the activations' type, whatever the type of the weights."""

    def reset_parameters(self) -> None:
        """Leaves the values open: `initialise` or a checkpoint gives them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class KeyExtractor(nn.Module):
    """Unit keys: the direction of a leaky average of projected inputs (equation 9), and the kernel's scale."""

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.n_head, self.eps = config.n_head, config.norm_eps
        self.projection = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.leak = nn.Parameter(torch.empty(config.n_head))
        self.log_scale = nn.Parameter(torch.empty(config.n_head))

    def forward(self, x: Tensor, past: Past, which: Average) -> Tensor:
        """[*tokens, n_embd] -> unit keys [*tokens, heads, dim]."""
        projected = split_heads(self.projection(x), self.n_head)
        return unit(past.average(projected, log_decay(self.leak, x.dtype), which), self.eps)


class MixedValues(nn.Module):
    """One projection, mixed per head between a token and the next: (1-c) W x_{t+1} + c W x_t (`lowrlinearconv`)."""

    def __init__(self, n_embd: int, n_head: int, *, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.projection = Linear(n_embd, n_embd, bias=bias)
        self.mix = nn.Parameter(torch.empty(n_head))
        self.log_scale = nn.Parameter(torch.empty(n_head))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[*tokens, n_embd] -> what each token adds to its own pair and to the pair before, [*tokens, heads, dim]."""
        projected = split_heads(self.projection(x), self.n_head)
        mix = self.mix.to(x.dtype)[:, None]
        return projected * mix, projected * (1 - mix)


class SeparateValues(nn.Module):
    """Two projections, of a token and of the next: W_0 x_t + W_1 x_{t+1} + b (`linearconv`)."""

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.current = Linear(config.n_embd, config.n_embd, bias=False)
        self.next = Linear(config.n_embd, config.n_embd, bias=False)
        self.bias = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None
        self.log_scale = nn.Parameter(torch.empty(config.n_head))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `MixedValues.forward`; the bias belongs to the token's own pair."""
        own = self.current(x)
        if self.bias is not None:
            own = own + self.bias.to(x.dtype)
        return split_heads(own, self.n_head), split_heads(self.next(x), self.n_head)


class ContextualMemory(nn.Module):
    """The memory of this sequence (section 4): pairs of a key and what came after, read by every later token."""

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.eps, self.log_scale_max = config.norm_eps, config.key_log_scale_max
        self.key = KeyExtractor(config)
        self.value: MixedValues | SeparateValues = (
            MixedValues(config.n_embd, config.n_head, bias=config.bias)
            if config.value_extractor == "lowrlinearconv"
            else SeparateValues(config)
        )
        self.output = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[*tokens, n_embd] -> [*tokens, n_embd]. The pair of a token is visible from the next token on."""
        key = self.key(x, past, Average.CONTEXTUAL)
        own, earlier = self.value(x)
        completed_value = unit(past.previous_contribution(own) + earlier, self.eps)
        # Both sides of k . k_i carry the scale; here the query carries the square of it.
        query = key * scale(self.key.log_scale, 2, 2 * self.log_scale_max, x.dtype)
        y = past.read(query, past.previous_key(key), completed_value)
        remembered: Tensor = self.output((y * scale(self.value.log_scale, 1, math.inf, x.dtype)).flatten(-2))
        return remembered


class PersistentMemory(nn.Module):
    """The memory learned in training (section 5): `pmem_count` banks of pairs per head, read and averaged."""

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.log_scale_max = config.persistent_key_log_scale_max
        shape = (config.pmem_count, config.n_head, config.pmem_size, config.head_dim)
        self.key = KeyExtractor(config)
        self.keys = nn.Parameter(torch.empty(shape))
        self.values = nn.Parameter(torch.empty(shape))
        self.log_scale = nn.Parameter(torch.empty(config.n_head))
        self.output = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[*tokens, n_embd] -> [*tokens, n_embd]."""
        key = self.key(x, past, Average.PERSISTENT)
        query = key * scale(self.key.log_scale, 2, self.log_scale_max, x.dtype)
        y = self._read(query.flatten(0, -3)) * scale(self.log_scale, 1, math.inf, x.dtype)
        remembered: Tensor = self.output(y.reshape(x.shape))
        return remembered

    def _read(self, query: Tensor) -> Tensor:
        """[rows, heads, dim] -> [rows, heads, dim], the mean over the banks."""
        banks = self.keys.shape[0]
        asked = query.transpose(0, 1).expand(banks, -1, -1, -1)
        y = read(asked, self.keys.to(query.dtype), self.values.to(query.dtype))
        return (y[0] if banks == 1 else y.mean(0)).transpose(0, 1)


class Block(nn.Module):
    """A contextual and a persistent memory, each behind a norm and added to the stream."""

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.contextual_norm = LayerNorm(config.n_embd, bias=config.bias)
        self.contextual = ContextualMemory(config)
        self.persistent_norm = LayerNorm(config.n_embd, bias=config.bias) if config.has_persistent else None
        self.persistent = PersistentMemory(config) if config.has_persistent else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """[*tokens, n_embd] -> [*tokens, n_embd]."""
        normed = self.contextual_norm(x)
        x = (x if self.pre_norm else normed) + self.contextual(normed, past)
        if self.persistent is None or self.persistent_norm is None:
            return x
        normed = self.persistent_norm(x)
        persistent: Tensor = self.persistent(normed, past)
        return (x if self.pre_norm else normed) + persistent


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """[..., n_embd] -> [..., heads, dim]."""
    return x.view(*x.shape[:-1], n_head, -1)


def log_decay(leak: Tensor, dtype: torch.dtype) -> Tensor:
    """Logarithm of a leaky average's factor per token, [heads], not positive."""
    return -(leak.to(dtype) * _STORED).abs()


def scale(log_scale: Tensor, power: int, most: float, dtype: torch.dtype) -> Tensor:
    """exp(min(power * log scale, most)) per head, [heads, 1]."""
    return torch.exp((log_scale.to(dtype) * (power * _STORED)).clamp(max=most))[:, None]
