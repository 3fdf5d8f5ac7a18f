import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.percentile import Distribution, percentile

SAMPLES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=200)


@given(SAMPLES)
def test_percentiles_are_those_of_the_statistics_module(sample: list[float]) -> None:
    expected = statistics.quantiles(sample, n=100, method="inclusive")
    ordered = sorted(sample)
    for percent in (1, 50, 90, 95, 99):
        assert percentile(ordered, percent) == pytest.approx(expected[percent - 1], rel=1e-9, abs=1e-6)


@given(SAMPLES)
def test_a_distribution_describes_its_sample(sample: list[float]) -> None:
    distribution = Distribution.of(sample)
    assert distribution is not None
    assert (distribution.count, distribution.min, distribution.max) == (len(sample), min(sample), max(sample))
    assert distribution.p50 == pytest.approx(statistics.median(sample), rel=1e-9, abs=1e-6)
    assert distribution.mean == pytest.approx(statistics.fmean(sample), rel=1e-9, abs=1e-6)


def test_one_value_is_every_percentile() -> None:
    assert Distribution.of([3.0]) == Distribution(1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)


def test_nothing_measured_is_not_zero() -> None:
    assert Distribution.of([]) is None
