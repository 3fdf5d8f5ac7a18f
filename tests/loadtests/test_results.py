"""From cells to files and tables, and from two files to ratios."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.cell import CellPlan, CellResult, disturbances, failures
from loadtests.compare import compare
from loadtests.errors import ResultsError
from loadtests.load import Measurement
from loadtests.plan import LoadPlan
from loadtests.plots import save_plots
from loadtests.record import Phase, RequestRecord
from loadtests.report import report
from loadtests.results import Results, load_results, prepare_directory
from loadtests.rows import THROUGHPUT, TTFT_P50, rows
from loadtests.summary import LatencyTarget, summarise
from loadtests.watch import Disturbance, Limits, Load, Verdict, judge
from loadtests.workload import Workload

QUIET = Load(window_s=10, busy=1.5, interrupts=0.01, steal=0, client=0.1, server=1.4, other=0.01, peak_other=0.02)


def cell(
    server: str = "a",
    *,
    concurrency: int = 1,
    round_number: int = 1,
    tokens: int = 100,
    ttft_s: float = 0.5,
    error: str | None = None,
    disturbance: Disturbance | None = None,
) -> CellResult:
    """One request of `tokens` tokens in ten seconds."""
    times_s = tuple(ttft_s + 9.0 * i / tokens for i in range(tokens))
    record = RequestRecord(
        0, Phase.MEASURED, 0.0, 9.9, times_s, None, tokens, 128, None, True, "length", 200, error, "busy" * bool(error)
    )
    plan = CellPlan(Workload(), LoadPlan(concurrency=concurrency, num_requests=1))
    measurement = Measurement(plan.load, (record,), 0.0, 10.0, 0.001)
    summary = summarise(measurement, output_tokens=128, target=LatencyTarget({"ttft": 600}))
    return CellResult(server, round_number, 0, plan, summary, disturbance or judge(QUIET, Limits()), measurement)


def results(*cells: CellResult, **changes: Any) -> Results:
    return replace(Results.of(cells, {"event_loop": "asyncio"}, ["a note"], with_events=True), **changes)


def test_results_survive_the_file(tmp_path: Path) -> None:
    saved = results(cell(), cell("b"))
    saved.save(tmp_path)
    loaded = load_results(tmp_path)
    assert json.loads(json.dumps(loaded.cells)) == json.loads(json.dumps(saved.cells))
    assert rows(loaded) == rows(saved)
    assert loaded.machine["num_usable_cores"] >= 1
    request = loaded.cells[0]["requests"][0]
    assert (request["ttft_ms"], request["output_tokens"], len(request["events_ms"])) == (500.0, 100, 100)


def test_rounds_are_reduced_to_their_median_and_worst_verdict() -> None:
    disturbed = judge(replace(QUIET, other=0.7), Limits())
    measured = rows(
        results(
            cell(tokens=100, round_number=1),
            cell("b"),
            cell(tokens=300, round_number=2, disturbance=disturbed),
            cell(tokens=110, round_number=3),
        )
    )
    assert [(row.server, row.cell) for row in measured] == [("a", "standard c1"), ("b", "standard c1")]
    assert measured[0].value(THROUGHPUT) == pytest.approx(11.0)
    assert measured[0].spread(THROUGHPUT) == pytest.approx((10.0, 30.0))
    assert measured[0].verdict is Verdict.DISTURBED
    assert measured[0].other_cores == 0.7
    assert measured[1].verdict is Verdict.CLEAN
    assert measured[1].spread(TTFT_P50) is None


def test_a_report_gives_numbers_and_ratios() -> None:
    text = report(results(cell(tokens=100, ttft_s=0.5), cell("b", tokens=200, ttft_s=0.25)))
    assert "Clean: nothing but" in text
    assert "- a note" in text
    assert "| standard c1 | a | 10.0 | 0.10 | 500 |" in text
    assert "| standard c1 | a → b | 10.0 → 20.0 | 500 → 250 | 500 → 250 | 2.00 | 0.50 |" in text


def test_a_report_of_a_disturbed_run_says_so_first() -> None:
    disturbed = judge(replace(QUIET, other=0.7), Limits())
    text = report(results(cell(disturbance=disturbed), cell("b", disturbance=judge(None, Limits()))))
    assert "Clean" not in text
    assert "**Disturbed**" in text.split("|")[0]
    assert "Cells: b standard c1" in text.split("|")[0]
    assert "| standard c1 (not clean) |" in text


def test_cells_that_may_not_be_believed_are_named() -> None:
    bad = cell("a", error="http_503")
    odd = cell("b", disturbance=judge(replace(QUIET, steal=0.5), Limits()))
    assert failures([bad, odd]) == ["a, standard c1: 1 of 1 failed: http_503 1 (busy)"]
    assert [line.split(":")[0] for line in disturbances([bad, odd])] == ["b, standard c1"]


def test_a_cell_without_a_request_has_failed() -> None:
    empty = cell()
    empty = replace(empty, summary=summarise(replace(empty.measurement, records=()), output_tokens=1))
    assert "none was sent" in failures([empty])[0]
    assert "| – |" in report(results(empty))


def test_two_files_are_compared_cell_by_cell() -> None:
    before = results(cell(tokens=100), cell(concurrency=8, tokens=100))
    after = results(cell("new", concurrency=8, tokens=150), cell("new", concurrency=32))
    text = compare(before, after)
    assert "| standard c8 | a → new | 10.0 → 15.0 |" in text
    assert "standard c1" not in text
    assert "standard c32" not in text


def test_servers_of_one_name_are_matched_or_chosen() -> None:
    both = results(cell("a", tokens=100), cell("b", tokens=200))
    text = compare(both, results(cell("a", tokens=110), cell("b", tokens=210)))
    assert "| a → a | 10.0 → 11.0 |" in text
    assert "| b → b | 20.0 → 21.0 |" in text
    assert "| a → b | 10.0 → 20.0 |" in compare(both, both, first_server="a", second_server="b")
    with pytest.raises(ResultsError, match="no server 'c'; there are a, b"):
        compare(both, both, first_server="c")


def test_what_makes_files_unequal_is_said() -> None:
    first = results(cell())
    machine = {**first.machine, "cpu_model": "another"}
    other_shape = json.loads(json.dumps(first.cells[0]))
    other_shape["workload"]["prompt_tokens"] = 4
    text = compare(first, replace(first, machine=machine, cells=(other_shape,)))
    assert "different machines: cpu_model" in text
    assert "standard c1: prompt_tokens 128 and 4" in text


def test_files_without_a_common_cell_cannot_be_compared() -> None:
    with pytest.raises(ResultsError, match="no cell in common"):
        compare(results(cell(concurrency=1)), results(cell(concurrency=2)))


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 0}', '{"schema": 1}'])
def test_files_that_are_no_results(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ResultsError, match=r"results\.json"):
        load_results(path)


def test_results_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    prepare_directory(tmp_path / "new" / "deep", may_overwrite=False)
    results(cell()).save(tmp_path / "new" / "deep")
    with pytest.raises(ResultsError, match="overwrite"):
        prepare_directory(tmp_path / "new" / "deep", may_overwrite=False)
    prepare_directory(tmp_path / "new" / "deep", may_overwrite=True)


def test_there_is_a_picture_for_each_workload(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = rows(results(cell(), cell(concurrency=8), cell("b"), cell("b", concurrency=8)))
    paths = save_plots(measured, tmp_path)
    assert [path.name for path in paths] == ["standard-concurrency.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
