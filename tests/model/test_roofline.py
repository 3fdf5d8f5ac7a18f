from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.kernels.roofline import Machine, StepCosts, Work, main
from model.presets import PRESETS


def test_a_steps_bound_follows_from_the_costs_alone() -> None:
    config, work, machine = PRESETS["small"], Work("", 8, 100, 1), Machine(1e9, 1e10, 1e11)
    costs = StepCosts.of(config, weight=1, pair=4)
    num_bytes = costs.weights_bytes + 8 * 100 * costs.pair_bytes
    computing = 8 * (costs.token_operations + costs.output_operations) / 1e10 + 800 * costs.pair_operations / 1e11
    assert machine.bound_s(work, config, work.bytes_moved(config, 1, 4)) == max(num_bytes / 1e9, computing)


def test_costs_and_rates_are_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--quantization", "int8", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = PRESETS["tiny"]
    assert found["weights_bytes"] == 2 * (5 * 32**2 + 2 * 32 * 48) + 512 * 32
    assert found["pair_bytes"] == 2 * 2 * config.n_embd * config.n_layer
    assert min(found["bytes_rate"], found["product_rate"], found["read_rate"]) > 0


def test_what_has_no_rates_is_refused_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
