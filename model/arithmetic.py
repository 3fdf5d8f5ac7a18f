"""The arithmetic of associative memories on plain tensors: unit vectors, leaky averages, reads by kernel smoothing.

Averages and reads keep to the type of their arguments under autocast too: a logit scale of 100 and more makes of
bfloat16 keys an error of 0.3 and more in a logit.

Equations: Zhang et al., "Memory Mosaics" (arXiv 2405.06394), sections 2 and 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import training

CHUNK_TOKENS = 64
"""Tokens that the parallel leaky average combines by one matrix product."""


def compute_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The type of norms, scales, softmaxes and averages: float32, or float64 where the weights are float64."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


def unit(x: Tensor, eps: float) -> Tensor:
    """x / (|x| + eps) along the last dimension. The zero vector stays zero, also for eps = 0."""
    if training.trains(x):
        return training.normalise(x, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y: Tensor = x * torch.reciprocal(norm + max(eps, torch.finfo(x.dtype).tiny))
    return y


def leaky_average(x: Tensor, log_decay: Tensor) -> Tensor:
    """Sums of the past that fade by exp(log_decay) a token: y_t = x_t + exp(log_decay) * y_{t-1}, y_{-1} = 0.

    x is [batch, time, heads, dim], log_decay [heads], not positive. The factor (1 - decay) of an average is left
    out, since keys are normalised afterwards. Chunks are summed by one triangular matrix per head; what enters a
    chunk is itself the leaky average of the chunks' ends, so no matrix exceeds CHUNK_TOKENS squared.
    """
    if training.trains(x, log_decay):
        return training.average(x, log_decay)
    with torch.autocast(x.device.type, enabled=False):
        return _leaky_average(x, log_decay)


def _leaky_average(x: Tensor, log_decay: Tensor) -> Tensor:
    time = x.shape[1]
    size = min(time, CHUNK_TOKENS)
    padded = F.pad(x, (0, 0, 0, 0, 0, -time % size))
    chunks = padded.view(x.shape[0], -1, size, *x.shape[2:])
    y = torch.einsum("hts,bcshd->bcthd", _decay_matrix(log_decay, size), chunks)
    if y.shape[1] > 1:
        ends = _leaky_average(y[:, :-1, -1], log_decay * size)
        entering = F.pad(ends, (0, 0, 0, 0, 1, 0))
        steps = torch.arange(1, size + 1, device=x.device)
        fading = torch.exp(log_decay * steps[:, None]).unsqueeze(-1)
        y = y + fading * entering.unsqueeze(2)
    return y.flatten(1, 2)[:, :time]


def _decay_matrix(log_decay: Tensor, size: int) -> Tensor:
    """[heads, size, size]: exp(log_decay * (row - column)) on and below the diagonal, 0 above."""
    steps = torch.arange(size, device=log_decay.device)
    distance = steps[:, None] - steps
    fading = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))
    return fading.masked_fill(distance < 0, 0)


def read(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Kernel smoothing: sum_i softmax_i(q . k_i) v_i, with q already scaled by the kernel's bandwidth.

    queries [batch, heads, asked, dim], keys and values [batch, heads, pairs, dim] -> [batch, heads, asked, dim].
    `mask`, four-dimensional, is added to the logits [batch, heads, asked, pairs], or says which of them count; with
    `causal`, query i sees pairs 0 .. i.
    """
    if mask is None and training.trains(queries, keys, values):
        return training.smooth(queries, keys, values, causal=causal)
    with torch.autocast(queries.device.type, enabled=False):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, scale=1.0)


def windowed_read(queries: Tensor, keys: Tensor, values: Tensor, window: int, hidden: Tensor) -> Tensor:
    """Kernel smoothing over the latest pairs: query j sees pairs j .. j + window - 1, but none of the first `hidden`.

    queries [batch, heads, asked, dim], keys and values [batch, heads, window - 1 + asked, dim], hidden [batch] less
    than `window`. Queries are read in blocks as long as the window, each with the pairs that any of them sees.
    """
    asked, size = queries.shape[2], min(queries.shape[2], window)
    padding = (0, 0, 0, -asked % size)
    blocks = F.pad(queries, padding).unfold(2, size, size)
    keys, values = (F.pad(x, padding).unfold(2, size + window - 1, size) for x in (keys, values))
    # [batch * blocks, heads, tokens, dim]
    q, k, v = (x.permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (blocks, keys, values))
    offset = torch.arange(k.shape[2], device=q.device) - torch.arange(size, device=q.device)[:, None]
    first = torch.arange(blocks.shape[2], device=q.device) * size
    is_there = first[:, None] + torch.arange(k.shape[2], device=q.device) >= hidden[:, None, None]
    sees = (offset >= 0) & (offset < window) & is_there.flatten(0, 1)[:, None, None, :]
    y = read(q, k, v, sees)
    return y.view(queries.shape[0], -1, *y.shape[1:]).transpose(1, 2).flatten(2, 3)[:, :, :asked]
