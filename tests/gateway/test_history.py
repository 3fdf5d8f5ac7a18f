"""What the dashboard is told, worked out from metrics, against the values that went into them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.block_holders import FIRST_OWNER, FREE, IDLE, SHARED
from service.engine.distribution import Distribution, Tally
from service.engine.stats import EngineStats
from service.gateway.dashboard import MAX_TILES, tiles_of
from service.gateway.history import NUM_SAMPLES, History
from service.gateway.survey import Survey
from service.gateway.totals import quantile
from service.metrics import GatewayMetrics, Phases
from tests.gateway.fake_engine import INFO

BOUNDS = (1.0, 2.0, 4.0, 8.0)


@given(st.lists(st.floats(0.01, 7.99), min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_value_it_stands_for(values: list[float], q: float) -> None:
    tally = Tally(BOUNDS)
    for value in values:
        tally.observe(value)
    counts, total, buckets = tally.snapshot().counts, 0, []
    for bound, count in zip([*BOUNDS, math.inf], counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    found = quantile(buckets, q)
    exact = sorted(values)[math.ceil(q * len(values)) - 1]
    upper = min(bound for bound in BOUNDS if bound >= exact)
    lower = max((bound for bound in (0.0, *BOUNDS) if bound < upper), default=0.0)
    assert found is not None
    assert lower <= found <= upper


def test_quantiles_at_the_edges() -> None:
    assert quantile([], 0.5) is None
    assert quantile([(1.0, 0.0), (math.inf, 0.0)], 0.5) is None
    assert quantile([(1.0, 0.0), (2.0, 0.0), (math.inf, 5.0)], 0.5) == 2.0, (
        "beyond the last bound, as Prometheus has it"
    )
    assert quantile([(1.0, 0.0), (2.0, 4.0), (math.inf, 4.0)], 0.5) == 1.5


def stats(name: str, *, steps: int, seqs: float, busy_s: float) -> EngineStats:
    sizes = Distribution((1.0,), (steps, 0), seqs)
    return EngineStats(
        name, num_running=2, num_blocks=10, num_free_blocks=4, num_steps=steps, step_time_s=busy_s, batch_sizes=sizes
    )


def test_rates_and_percentiles_are_those_of_the_last_samples() -> None:
    history, metrics = History(), GatewayMetrics(INFO, "1", "a")
    metrics.ttft.observe(5.0)  # long ago
    for second in range(0, 12, 2):
        replicas = [stats("x", steps=10 * second, seqs=30.0 * second, busy_s=0.5 * second)]
        history.record(Survey([metrics.families()], replicas), float(second))
        metrics.generation_tokens.inc(40)
        metrics.ttft.observe(0.0025)
        metrics.finished("stop", 1, 1, Phases(0.1, 0.2, 0.3, 0.4, 0.5))
        metrics.rejected("overloaded")
        metrics.rejected("unknown_parameter")
    first, *_, last = history.since(0)
    assert (first["number"], last["number"]) == (1, 6)
    assert first["ttft"] == [None, None, None]
    assert last["generation_tokens"] == 20
    assert last["requests"] == last["refused"] == 0.5, "what is the client's own fault is not counted"
    assert last["ttft"] == pytest.approx([0.0025, 0.0029, 0.00299])
    assert last["phases"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (last["batch"], last["busy"], last["step"]) == (3, 0.5, 0.05)
    assert (last["running"], last["memory"]) == (2, 0.6)
    assert [sample["number"] for sample in history.since(4)] == [5, 6]
    assert history.since(6) == history.since(99) == []


def test_gateways_and_replicas_that_come_and_go_leave_no_negative_rates() -> None:
    history = History()
    one, other = GatewayMetrics(INFO, "1", "one"), GatewayMetrics(INFO, "1", "other")
    one.generation_tokens.inc(100)
    other.generation_tokens.inc(50)
    replicas = [stats("x", steps=10, seqs=10, busy_s=1), stats("y", steps=90, seqs=90, busy_s=1)]
    history.record(Survey([one.families(), other.families()], replicas), 0.0)
    one.generation_tokens.inc(10)
    history.record(Survey([one.families()], [stats("x", steps=20, seqs=40, busy_s=2)]), 2.0)
    history.record(Survey([one.families()], None), 4.0)
    _, second, third = history.since(0)
    assert second["generation_tokens"] == 0, "the sum shrank"
    assert second["batch"] == 3
    assert (second["up"], third["up"], third["replicas"], third["batch"]) == (True, False, 0, 0)


def test_the_ring_is_bounded() -> None:
    history, metrics = History(), GatewayMetrics(INFO, "1", "a")
    families = metrics.families()
    for second in range(NUM_SAMPLES + 10):
        history.record(Survey([families], []), float(second))
    samples = history.since(0)
    assert len(samples) == NUM_SAMPLES
    assert samples[-1]["number"] == NUM_SAMPLES + 10


def test_tiles_tell_free_idle_shared_and_held() -> None:
    assert tiles_of(bytes([FREE, IDLE, SHARED, FIRST_OWNER, FIRST_OWNER + 1, FIRST_OWNER + 26])) == ".-=aba"
    assert tiles_of(b"") == ""
    many = bytes([FREE] * MAX_TILES + [FREE, FIRST_OWNER] * (MAX_TILES // 2) + [IDLE] * MAX_TILES)
    tiles = tiles_of(many)
    assert len(tiles) == MAX_TILES
    assert set(tiles) == {".", "a", "-"}
