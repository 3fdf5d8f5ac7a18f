from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.errors import ResultsError
from loadtests.report import measured_table
from loadtests.results import load_results
from loadtests.roofline import StepCosts, cell_roofline
from loadtests.rows import rows
from tests.loadtests.test_results import cell, results

COSTS = StepCosts(
    weights_bytes=1000.0,
    pair_bytes=10.0,
    token_operations=500.0,
    output_operations=100.0,
    pair_operations=2.0,
    bytes_rate=1e4,
    product_rate=1e4,
    read_rate=1e3,
)


def test_prefill_computes_every_new_token_and_every_pair_it_reads() -> None:
    assert COSTS.prefill_s(3) == pytest.approx(3 * 0.05 + 0.01 + (0 + 1 + 2) * 0.002)
    assert COSTS.prefill_s(5, num_cached=4) == pytest.approx(0.05 + 0.01 + 4 * 0.002)


def test_a_decode_step_takes_the_longer_of_moving_and_computing() -> None:
    assert COSTS.decode_s(1, 7) == pytest.approx((1000 + 70) / 1e4)
    assert COSTS.decode_s(8, 7) == pytest.approx(8 * 0.06 + 56 * 0.002)
    assert replace(COSTS, product_rate=1e9, read_rate=1e9).decode_s(8, 7) == pytest.approx((1000 + 560) / 1e4)


def test_a_cell_is_absorbed_one_by_one_and_generated_together() -> None:
    seconds = 2 * COSTS.prefill_s(4, 1) + COSTS.decode_s(2, 4) + COSTS.decode_s(2, 5)
    assert COSTS.tokens_per_s(2, 4, 3, shared_prefix_tokens=1) == pytest.approx(2 * 3 / seconds)


def _cell(**load: Any) -> dict[str, Any]:
    workload = {"prompt_tokens": 4, "output_tokens": 3, "shared_prefix_tokens": 0, "num_texts": 0}
    return {"workload": workload, "load": {"concurrency": 2, "rate": None, **load}}


def test_cells_of_unknown_users_have_no_roofline() -> None:
    assert cell_roofline(COSTS, _cell()) == COSTS.tokens_per_s(2, 4, 3)
    assert cell_roofline(COSTS, _cell(concurrency=None, rate=3.0)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({**COSTS.described(), "pair_bytes": 0})])
def test_costs_that_cannot_be_used_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ResultsError):
        StepCosts.load(path)


def test_a_table_has_the_share_of_the_roofline_where_costs_are_known(tmp_path: Path) -> None:
    assert "roofline" not in measured_table(rows(results(cell(), cell("b"))))
    results(cell(), cell("b"), step_costs={"a": COSTS}).save(tmp_path)
    first, second = measured = rows(load_results(tmp_path))
    assert first.roofline == COSTS.tokens_per_s(1, 128, 128)
    assert first.roofline_share == pytest.approx(10.0 / first.roofline)
    assert second.roofline_share is None
    assert "| roofline | share |" in measured_table(measured)
