"""Weights as int8 with a scale each output, and inputs quantised row by row as they come: the plain form in torch.

Sums are of integers and exact, so every kernel that quantises alike agrees on them. What is normalised, averaged or
exponentiated stays float32; so do the pairs of the contextual memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Linear, PersistentMemory
from model.network import MosaicNetwork

STEPS = 127
READ_BLOCK = 128
"""Pairs of a persistent memory whose weights are quantised against the largest of them: `read_block` of cpu/paths.h."""

Network = TypeVar("Network", bound=MosaicNetwork)
Module = TypeVar("Module", bound=nn.Module)


class Quantised(NamedTuple):
    """Integers from -127 to 127 in `rows` int8 [..., n], each standing for itself times `steps` [..., 1]."""

    rows: Tensor
    steps: Tensor


def quantise(x: Tensor) -> Quantised:
    """`x` [..., n] to 255 levels of each row, symmetric about 0."""
    top = x.float().abs().amax(-1, keepdim=True)
    is_zero = top <= 1e-30
    inverse = torch.where(is_zero, 0.0, STEPS / top.masked_fill(is_zero, 1.0))
    return Quantised((x.float() * inverse).round().to(torch.int8), (top / STEPS).masked_fill_(is_zero, 0.0))


def product(x: Quantised, weight: Quantised) -> Tensor:
    """x [..., n], weight [..., outputs, n] -> float32 [..., outputs]; broadcasts as `torch.matmul` does."""
    # The largest sum of this depth decides what holds it exactly.
    exact = torch.float32 if x.rows.shape[-1] * STEPS**2 < 2**24 else torch.float64
    sums = x.rows.to(exact) @ weight.rows.to(exact).transpose(-1, -2)
    return sums.float() * (weight.steps.transpose(-1, -2) * x.steps)


class QuantisedLinear(nn.Module):
    """A linear layer of int8 weights."""

    rows: Tensor
    steps: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        rows, steps = quantise(weight.detach())
        self.register_buffer("rows", rows)
        self.register_buffer("steps", steps)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., outputs]."""
        y = product(quantise(x), Quantised(self.rows, self.steps))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantisedPersistentMemory(PersistentMemory):
    """A persistent memory of int8 pairs: keys quantised pair by pair, values dimension by dimension."""

    def __init__(self, memory: PersistentMemory) -> None:
        nn.Module.__init__(self)
        self.log_scale_max, self.log_scale = memory.log_scale_max, memory.log_scale
        self.key, self.output = memory.key, memory.output
        self.quantised_keys = quantise(memory.keys.detach())
        self.quantised_values = quantise(memory.values.detach().transpose(-1, -2))

    def _read(self, query: Tensor) -> Tensor:
        """[rows, heads, dim] -> [rows, heads, dim], the mean over the banks."""
        asked = quantise(query.transpose(0, 1))
        banks = zip(*self.quantised_keys, *self.quantised_values, strict=True)
        reads = [_read_bank(asked, Quantised(*bank[:2]), Quantised(*bank[2:])) for bank in banks]
        return torch.stack(reads).mean(0).transpose(0, 1)


def _read_bank(asked: Quantised, keys: Quantised, values: Quantised) -> Tensor:
    """asked [heads, rows, dim], keys [heads, pairs, dim], values [heads, dim, pairs] -> [heads, rows, dim]."""
    logits = product(asked, keys)
    padding = -logits.shape[-1] % READ_BLOCK
    blocks = _in_blocks(F.pad(logits, (0, padding), value=-torch.inf))
    here = blocks.amax(-1, keepdim=True)
    weights = ((blocks - here).exp() * 255).round()
    worth = (here - here.amax(-2, keepdim=True)).exp()
    stored = _in_blocks(F.pad(values.rows, (0, padding))).float()
    sums = torch.einsum("hrbp,hdbp->hrbd", weights, stored)
    mass = (worth * weights.sum(-1, keepdim=True)).sum(-2)
    read: Tensor = (worth * sums).sum(-2) * values.steps.transpose(-1, -2) / mass
    return read


def _in_blocks(x: Tensor) -> Tensor:
    """[..., pairs] -> [..., blocks, READ_BLOCK]."""
    return x.view(*x.shape[:-1], -1, READ_BLOCK)


def quantise_network(network: Network) -> Network:
    """Replaces the weight matrices of `network` by int8, in place; returns it.

    The embedding's table stays, and so do matrices that set a scale or a decay.
    """
    if network.head is None:
        network.head = QuantisedLinear(network.embedding.weight)
    # A memory takes over its linear layers: these first.
    _replace(network, Linear, lambda linear: QuantisedLinear(linear.weight, linear.bias))
    _replace(network, PersistentMemory, QuantisedPersistentMemory)
    return network


def _replace(network: MosaicNetwork, kind: type[Module], replacement: Callable[[Module], nn.Module]) -> None:
    for parent_name, parent in list(network.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind) and not f"{parent_name}.{name}.weight".endswith(network.PRECISE):
                setattr(parent, name, replacement(child))
