"""A Memory Mosaic in plain torch, whole matrices at a time: how one would write the equations down to train them.

Every leaky average is a product with a [time, time] matrix, every memory a softmax of all its logits. Shares nothing
with `model`'s layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MosaicConfig


def plain_logits(weights: Mapping[str, Tensor], config: MosaicConfig, token_ids: Tensor) -> Tensor:
    """[batch, time] -> logits [batch, time, vocab_size]. For configurations without biases, of the published kind."""
    x = weights["embedding.weight"][token_ids]
    for layer in range(config.n_layer):
        block = {n.removeprefix(f"blocks.{layer}."): w for n, w in weights.items() if n.startswith(f"blocks.{layer}.")}
        x = x + _contextual(block, config, _norm(x, block["contextual_norm.weight"]))
        x = x + _persistent(block, config, _norm(x, block["persistent_norm.weight"]))
    return F.linear(_norm(x, weights["norm.weight"]), weights["embedding.weight"]) * config.logit_scale


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight)


def _heads(x: Tensor, config: MosaicConfig) -> Tensor:
    """[batch, time, n_embd] -> [batch, heads, time, dim]"""
    return x.unflatten(-1, (config.n_head, -1)).transpose(1, 2)


def _keys(block: Mapping[str, Tensor], config: MosaicConfig, name: str, x: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1])
    distance = steps[:, None] - steps
    decay = -(10 * block[f"{name}.leak"]).abs()[:, None, None] * distance
    average = torch.exp(decay.masked_fill(distance < 0, -math.inf)) @ _heads(
        F.linear(x, block[f"{name}.projection.weight"]), config
    ).to(decay.dtype)
    return average / (average.norm(dim=-1, keepdim=True) + config.norm_eps)


def _contextual(block: Mapping[str, Tensor], config: MosaicConfig, x: Tensor) -> Tensor:
    scale = torch.exp((10 * block["contextual.key.log_scale"]).clamp(max=config.key_log_scale_max))
    keys = scale[:, None, None] * _keys(block, config, "contextual.key", x)
    projected, mix = (
        _heads(F.linear(x, block["contextual.value.projection.weight"]), config),
        block["contextual.value.mix"],
    )
    values = (1 - mix[:, None, None]) * projected[:, :, 1:] + mix[:, None, None] * projected[:, :, :-1]
    values = values / (values.norm(dim=-1, keepdim=True) + config.norm_eps)
    values = torch.exp(10 * block["contextual.value.log_scale"])[:, None, None] * values
    logits = keys[:, :, 1:] @ keys[:, :, :-1].transpose(-1, -2)
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    read = torch.softmax(logits.masked_fill(hidden, -math.inf), dim=-1) @ values
    y = F.pad(read, (0, 0, 1, 0)).transpose(1, 2).flatten(-2)
    return F.linear(y, block["contextual.output.weight"])


def _persistent(block: Mapping[str, Tensor], config: MosaicConfig, x: Tensor) -> Tensor:
    log_scale = (20 * block["persistent.key.log_scale"]).clamp(max=config.persistent_key_log_scale_max)
    keys = torch.exp(log_scale)[:, None, None] * _keys(block, config, "persistent.key", x)
    weights = torch.softmax(keys[:, None] @ block["persistent.keys"].transpose(-1, -2), dim=-1)
    read = (weights @ block["persistent.values"]).mean(1) * torch.exp(10 * block["persistent.log_scale"])[:, None, None]
    return F.linear(read.transpose(1, 2).flatten(-2), block["persistent.output.weight"])
