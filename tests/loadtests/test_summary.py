"""Numbers of made-up measurements, worked out by hand or by the statistics module."""

import random
import statistics
from dataclasses import replace

import pytest

from loadtests.errors import WorkloadError
from loadtests.load import Measurement
from loadtests.plan import LoadPlan
from loadtests.record import Phase, RequestRecord
from loadtests.summary import LatencyTarget, summarise


def record(index: int, start_s: float, times_s: list[float], **changes: object) -> RequestRecord:
    """A request whose events carry one token each unless `output_tokens` says otherwise."""
    base = RequestRecord(
        index,
        Phase.MEASURED,
        start_s,
        times_s[-1] - start_s if times_s else 0.0,
        times_s=tuple(times_s),
        output_tokens=len(times_s),
        prompt_tokens=5,
        has_usage=True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def measurement(*records: RequestRecord, window: tuple[float, float] = (0.0, 10.0), **plan: float) -> Measurement:
    load = LoadPlan(**({"concurrency": 1, "num_requests": 1} | plan if "rate" not in plan else plan))
    return Measurement(load, records, window[0], window[1], client_cpu_s=0.001)


def test_latencies_are_those_of_the_statistics_module() -> None:
    draws = random.Random(1)
    records, firsts, gaps = [], [], []
    for index in range(60):
        start = draws.uniform(0, 5)
        own = [draws.uniform(0.001, 0.1) for _ in range(7)]
        times = [start + sum(own[: i + 1]) for i in range(7)]
        records.append(record(index, start, times))
        firsts.append(own[0] * 1e3)
        gaps += [gap * 1e3 for gap in own[1:]]
    summary = summarise(measurement(*records), output_tokens=7)
    for distribution, sample in ((summary.ttft_ms, firsts), (summary.itl_ms, gaps)):
        assert distribution is not None
        cuts = statistics.quantiles(sample, n=100, method="inclusive")
        found = (distribution.p50, distribution.p90, distribution.p95, distribution.p99)
        assert found == pytest.approx([cuts[i] for i in (49, 89, 94, 98)])
        assert distribution.count == len(sample)


def test_throughput_counts_what_arrived_in_the_window() -> None:
    warmup = record(0, -2.0, [-1.0, 1.0, 2.0], phase=Phase.WARMUP)
    measured = record(1, 0.0, [3.0, 4.0])
    filler = record(2, 5.0, [6.0, 11.0], phase=Phase.FILLER, error="disconnected", output_tokens=0)
    summary = summarise(measurement(warmup, measured, filler), output_tokens=2)
    assert summary.output_tokens_per_s == pytest.approx((2 + 2 + 1) / 10)
    assert summary.requests_per_s == pytest.approx(0.1)
    assert (summary.num_requests, summary.output_tokens, summary.prompt_tokens) == (1, 2, 5)
    assert summary.client_us_per_token == pytest.approx(1000 / 5)


def test_events_of_several_tokens_weigh_as_many() -> None:
    measured = record(0, 0.0, [1.0, 2.0], output_tokens=8)
    cut_off = record(1, 0.0, [3.0], phase=Phase.FILLER, error="disconnected", output_tokens=0)
    summary = summarise(measurement(measured, cut_off), output_tokens=8)
    assert summary.tokens_per_event == 4
    assert summary.output_tokens_per_s == pytest.approx((8 + 4) / 10)
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.p50 == pytest.approx(1000 / 7)


def test_exact_counts_are_used_where_the_server_gives_them() -> None:
    measured = record(0, 0.0, [1.0, 12.0], output_tokens=8, token_counts=(7, 1))
    assert summarise(measurement(measured), output_tokens=8).output_tokens_per_s == pytest.approx(0.7)


def test_tokens_of_failed_requests_do_not_count() -> None:
    good = record(0, 0.0, [1.0])
    failed = record(1, 0.0, [1.0, 2.0], error="disconnected", output_tokens=2)
    refused = record(2, 0.0, [], error="http_503", output_tokens=0)
    summary = summarise(measurement(good, failed, refused), output_tokens=1)
    assert summary.output_tokens_per_s == pytest.approx(0.1)
    assert (summary.num_requests, summary.num_succeeded, summary.num_failed) == (3, 1, 2)
    assert summary.errors == {"disconnected": 1, "http_503": 1}
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.count == 1


def test_tokens_without_text_count_when_the_answer_ends() -> None:
    summary = summarise(measurement(record(0, 0.0, [], output_tokens=6, e2e_s=2.0)), output_tokens=6)
    assert summary.output_tokens_per_s == pytest.approx(0.6)
    assert summary.num_without_text == 1
    assert summary.ttft_ms is None


def test_short_answers_are_counted() -> None:
    assert summarise(measurement(record(0, 0.0, [1.0])), output_tokens=2).num_short == 1


def test_nothing_measured_is_no_number() -> None:
    summary = summarise(measurement(window=(1.0, 1.0)), output_tokens=2)
    assert (summary.num_requests, summary.output_tokens_per_s, summary.client_us_per_token) == (0, 0.0, None)
    assert summary.e2e_ms is None


def test_goodput_is_what_met_every_target() -> None:
    fast = record(0, 0.0, [0.1, 0.15])
    slow_first = record(1, 0.0, [0.4, 0.45])
    slow_after = record(2, 0.0, [0.1, 0.5])
    failed = record(3, 0.0, [0.1, 0.15], error="stream_error")
    single = record(4, 0.0, [0.1])
    target = LatencyTarget({"ttft": 200, "tpot": 100})
    summary = summarise(measurement(fast, slow_first, slow_after, failed, single), output_tokens=2, target=target)
    assert summary.goodput is not None
    assert summary.goodput.num_good == 2
    assert summary.goodput.share == pytest.approx(0.4)
    assert summary.goodput.requests_per_s == pytest.approx(0.2)


@pytest.mark.parametrize("limits", [{"itl": 5.0}, {"ttft": 0.0}, {"ttft": float("nan")}])
def test_targets_that_are_none(limits: dict[str, float]) -> None:
    with pytest.raises(WorkloadError):
        LatencyTarget(limits)


def test_lateness_is_of_open_loops_alone() -> None:
    late = record(0, 0.0, [1.0], lateness_s=0.003)
    assert summarise(measurement(late), output_tokens=1).lateness_ms is None
    lateness = summarise(measurement(late, rate=1.0, num_requests=1), output_tokens=1).lateness_ms
    assert lateness is not None
    assert lateness.max == pytest.approx(3.0)
