"""What moves a network's parameters, AdamW and Muon, and the learning rate at every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from model.training.recipe import Training


def make_optimisers(network: nn.Module, training: Training) -> list[torch.optim.Optimizer]:
    """Weight decay pulls at matrices only: norms, biases, scales and leaks go where the loss wants them."""
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    by_muon = [p for name, p in parameters.items() if training.optimiser == "muon" and _is_block_matrix(name, p)]
    others = [p for p in parameters.values() if not any(p is matrix for matrix in by_muon)]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=training.betas, fused=True)
    if not by_muon:
        return [adamw]
    # Its steps are scaled to the size that AdamW's have, so that one learning rate serves both.
    muon = torch.optim.Muon(by_muon, lr=0.0, weight_decay=training.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2


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
