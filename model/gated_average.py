"""Sums of the past whose gates and decays depend on the token, kept as a mantissa and the logarithm of a scale.

Gates are exponentials of anything, so the sums themselves may leave every floating point range; their direction, which
is all that a key needs, does not. Equation: Zhang and Bottou, "Memory Mosaics at Scale" (arXiv 2507.03285), section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 32
"""Tokens that the parallel form combines by one matrix product."""


def gated_average(x: Tensor, log_gate: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = exp(log_gate_t) * x_t + exp(log_decay_t) * y_{t-1}, y_{-1} = 0, for all tokens at once.

    x is [batch, time, heads, dim], log_gate and log_decay, not positive, [batch, time, heads]. Returns m, like x, and
    s, like log_gate, with y = exp(s) * m, where the largest term of the sum that is m has the weight 1.

    Within a chunk y_t = exp(L_t) * sum_r exp(log_gate_r - L_r) x_r, L the sums of log_decay; what enters a chunk is one
    more term. What enters all chunks is this same sum over the chunks' ends, so no matrix exceeds CHUNK_TOKENS squared.
    Scales are held constant in the backward pass: they are shifts between m and s that leave y as it is.
    """
    time, size = x.shape[1], min(x.shape[1], CHUNK_TOKENS)
    x, log_gate, log_decay = (_chunked(tensor, size) for tensor in (x, log_gate, log_decay))
    # Differences of long sums: what is lost here would be a factor of a term's weight.
    faded = log_decay.double().cumsum(2)
    height = log_gate.double() - faded
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[1] > 1:
            x, height = _with_entering(x, height, faded[:, :, -1])
        peak = height.detach().cummax(2).values[:, :, -size:]
        mantissa = torch.einsum("bchts,bcshd->bcthd", _weights(height, peak, x.dtype), x)
    scale = (faded + peak).to(x.dtype)
    return mantissa.flatten(1, 2)[:, :time], scale.flatten(1, 2)[:, :time]


def gated_step(
    x: Tensor, log_gate: Tensor, log_decay: Tensor, mantissa: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `gated_average`: x and mantissa [..., heads, dim], the others [..., heads].

    Before a first token the mantissa is 0 and the scale minus infinity.
    """
    kept = scale + log_decay
    peak = torch.maximum(kept, log_gate)
    weights = torch.exp(kept - peak), torch.exp(log_gate - peak)
    return weights[0].unsqueeze(-1) * mantissa + weights[1].unsqueeze(-1) * x, peak


def _chunked(x: Tensor, size: int) -> Tensor:
    """[batch, time, ...] -> [batch, chunks, size, ...], filled up with zeros."""
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % size))
    return padded.view(x.shape[0], -1, size, *x.shape[2:])


def _with_entering(x: Tensor, height: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Puts what enters each chunk in front of its terms. `total` [batch, chunks, heads]: log decay of whole chunks."""
    top = height.detach().amax(2, keepdim=True)
    ends = torch.einsum("bcsh,bcshd->bchd", torch.exp(height - top).to(x.dtype), x)
    # The last chunk's end enters no other.
    entering, scale = gated_average(ends[:, :-1], (total + top[:, :, 0])[:, :-1], total[:, :-1])
    entering = F.pad(entering, (0, 0, 0, 0, 1, 0)).unsqueeze(2)
    scale = F.pad(scale.double(), (0, 0, 1, 0), value=-math.inf).unsqueeze(2)
    return torch.cat([entering, x], 2), torch.cat([scale, height], 2)


def _weights(height: Tensor, peak: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, chunks, heads, tokens, terms]: exp(height - peak) of the terms up to each token, 0 of later ones."""
    height, peak = height.transpose(2, 3), peak.transpose(2, 3)
    terms, tokens = height.shape[3], peak.shape[3]
    is_later = torch.ones(tokens, terms, dtype=torch.bool, device=height.device).triu(terms - tokens + 1)
    logs = (height.unsqueeze(3) - peak.unsqueeze(4)).to(dtype)
    return torch.exp(logs.masked_fill(is_later, -math.inf))
