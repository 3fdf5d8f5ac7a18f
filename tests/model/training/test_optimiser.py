"""The learning rate over a run, and what weight decay pulls at."""

from __future__ import annotations

import pytest
import torch

from model.mosaic_v1 import MemoryMosaic
from model.training.optimiser import learning_rate, make_optimisers
from model.training.recipe import Training
from tests.model.mosaics import small_config


def training(**changes: object) -> Training:
    values = {"steps": 100, "batch": 1, "micro_batch": 1, "learning_rate": 1.0, "warmup_steps": 10}
    return Training.model_validate(values | changes)


def test_warm_up_then_cosine() -> None:
    recipe = training(final_learning_rate=0.1)
    assert [learning_rate(step, recipe) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, recipe) == pytest.approx(1.0)
    assert learning_rate(55, recipe) == pytest.approx(0.55)
    assert learning_rate(100, recipe) == pytest.approx(0.1)


def test_constant_until_the_decay() -> None:
    recipe = training(schedule="constant", decay_steps=20)
    assert [learning_rate(step, recipe) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    decay = [learning_rate(step, recipe) for step in range(80, 101)]
    assert decay == sorted(decay, reverse=True)
    assert decay[5] == pytest.approx(0.5)
    assert decay[-1] == 0
    assert learning_rate(99, training(schedule="constant")) == 1.0


def test_only_matrices_decay() -> None:
    model = MemoryMosaic(small_config(bias=True))
    (optimiser,) = make_optimisers(model, training(weight_decay=0.5, learning_rate=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in optimiser.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        shrunk = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrunk)


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = MemoryMosaic(small_config(bias=True))
    adamw, muon = make_optimisers(model, training(optimiser="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert sorted(moved[0] + moved[1]) == sorted(names.values())
    assert {name.rsplit(".", 2)[-2] for name in moved[1]} == {"projection", "output"}
    assert "blocks.0.persistent.keys" in moved[0]
