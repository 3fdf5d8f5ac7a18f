"""Where training starts: the published initial values, by the names of a model's tensors."""

from __future__ import annotations

import math

import torch
from torch import nn

from model.config import MosaicConfig


@torch.no_grad()
def initialise(model: nn.Module, config: MosaicConfig) -> None:
    """Draws every parameter of `model` anew.

    Matrices are normal with variance 1/fan-in, those that add to the stream divided by the depth; leaks spread from
    slow heads to fast ones.
    """
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind == "leak":
            parameter.copy_(torch.linspace(0.05, 0.5, config.n_head))
        elif kind == "log_scale":
            parameter.fill_(0.1 if name.endswith("key.log_scale") else -0.05)
        elif kind == "mix":
            parameter.uniform_(0, 1)
        elif kind == "bias":
            parameter.zero_()
        elif "norm." in name:
            parameter.fill_(1)
        else:
            parameter.normal_(std=1 / math.sqrt(_fan_in(name, config)))


def _fan_in(name: str, config: MosaicConfig) -> int:
    if name == "embedding.weight" and not config.tied:
        return 1
    if name.endswith((".keys", ".values")):
        return config.head_dim
    if name.endswith(("value.current.weight", "value.next.weight")):
        return 2 * config.n_embd
    return config.n_embd * (config.n_layer if name.endswith(".output.weight") else 1)
