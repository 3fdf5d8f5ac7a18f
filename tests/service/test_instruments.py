"""What instruments tell, against Prometheus' own that were given the same values."""

from __future__ import annotations

import pickle
from functools import partial

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric

from service.instruments import Counter, Family, Gauge, Histogram
from service.metrics import Families

BOUNDS = (0.001, 0.5, 1.0, 20.0)
LABELS = {"gateway": 'a "b"\\'}
Amounts = list[tuple[str, float]]
AMOUNTS = st.lists(st.tuples(st.sampled_from(["GET", "POST"]), st.integers(0, 40).map(lambda n: n / 2)), max_size=30)


def text_of(families: list[Metric]) -> list[str]:
    lines = prometheus_client.generate_latest(Families(families)).decode().splitlines()
    return [line for line in lines if "_created" not in line]


@given(AMOUNTS, AMOUNTS)
def test_what_is_told_is_what_prometheus_would_tell(first: Amounts, then: Amounts) -> None:
    counters = Family(Counter, "counter", "c", "Counts.", LABELS, ("method",))
    gauges = Family(Gauge, "gauge", "g", "Is.", LABELS, ("method",))
    histograms = Family(partial(Histogram, bounds=BOUNDS), "histogram", "h", "Spreads.", LABELS, ("method",))
    registry = prometheus_client.CollectorRegistry()
    names = (*LABELS, "method")
    their_counters = prometheus_client.Counter("c", "Counts.", names, registry=registry)
    their_gauges = prometheus_client.Gauge("g", "Is.", names, registry=registry)
    their_histograms = prometheus_client.Histogram("h", "Spreads.", names, registry=registry, buckets=BOUNDS)
    for amounts in (first, then):
        for method, amount in amounts:
            counters.of(method).inc(amount)
            gauges.of(method).set(amount)
            histograms.of(method).observe(amount)
            their_counters.labels(*LABELS.values(), method).inc(amount)
            their_gauges.labels(*LABELS.values(), method).set(amount)
            their_histograms.labels(*LABELS.values(), method).observe(amount)
        ours = [family.collect() for family in (counters, gauges, histograms)]
        assert text_of(ours) == text_of(list(registry.collect()))


def test_what_was_collected_stays_as_it_was_and_can_be_sent() -> None:
    counters = Family(Counter, "counter", "c", "Counts.", LABELS)
    counters.of().inc(2)
    metric = counters.collect()
    counters.of().inc(3)
    assert [sample.value for sample in pickle.loads(pickle.dumps(metric)).samples] == [2]


def test_a_gauge_can_be_asked_when_it_is_wanted() -> None:
    gauge, values = Gauge("g", {}), [1, 2]
    gauge.read = lambda: values.pop()
    assert [gauge.samples()[0].value for _ in range(2)] == [2, 1]
