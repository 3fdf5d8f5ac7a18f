"""AdamW over a network's parameters, and the learning rate at every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from model.training.recipe import Training


def make_optimiser(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Weight decay pulls at matrices only: norms, biases, scales and leaks go where the loss wants them."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, fused=True)


def learning_rate(step: int, training: Training) -> float:
    """For step 0, 1, ...: linear warm-up, then the schedule; `final_learning_rate` after the last step."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    return training.final_learning_rate + _share(step, training) * (
        training.learning_rate - training.final_learning_rate
    )


def _share(step: int, training: Training) -> float:
    left = max(training.steps - step, 0)
    if training.schedule == "constant":
        # 1 - sqrt keeps less time near the peak than a line does, which ends lower (Hägele et al., arXiv 2405.18392).
        return 1.0 - math.sqrt(1.0 - min(left / training.decay_steps, 1.0)) if training.decay_steps else 1.0
    decaying = max(training.steps - training.warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left / decaying)))
