"""How many replicas there should be, by arithmetic alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.autoscaling import TARGET_USE, Load, Scaling, UseMeter, wanted_replicas

loads = st.lists(st.builds(Load, backlog_s=st.floats(0, 1000), use=st.floats(0, 1)), max_size=8)


def test_nothing_to_do_needs_nobody() -> None:
    assert wanted_replicas([], 10) == 0
    assert wanted_replicas([Load(0, 0)] * 3, 10) == 0


def test_a_single_stream_needs_one_however_long_it_runs() -> None:
    assert math.ceil(wanted_replicas([Load(backlog_s=0.3, use=0.4)], 10)) == 1


def test_a_burst_is_met_at_once_by_as_many_as_it_needs() -> None:
    assert wanted_replicas([Load(backlog_s=45, use=1)], 10) == 4.5


def test_two_that_are_both_needed_stay_though_nothing_piles_up() -> None:
    assert math.ceil(wanted_replicas([Load(1, 0.7), Load(1, 0.7)], 10)) == 2
    assert math.ceil(wanted_replicas([Load(1, 0.3), Load(1, 0.3)], 10)) == 1


@given(loads=loads, target_s=st.floats(0.1, 100))
def test_with_so_many_replicas_each_has_no_more_than_it_should(loads: list[Load], target_s: float) -> None:
    number = max(math.ceil(wanted_replicas(loads, target_s) * (1 - 1e-9)), 1)
    assert sum(load.backlog_s for load in loads) / number <= target_s * (1 + 1e-6)
    assert sum(load.use for load in loads) / number <= TARGET_USE * (1 + 1e-6)


@given(loads=loads, more=st.builds(Load, backlog_s=st.floats(0, 1000), use=st.floats(0, 1)))
def test_more_work_never_needs_fewer(loads: list[Load], more: Load) -> None:
    assert wanted_replicas([*loads, more], 10) >= wanted_replicas(loads, 10)


def test_use_is_the_growth_of_work_over_time() -> None:
    meter = UseMeter()
    assert meter.share(5.0, 100.0) == 0.0
    assert meter.share(5.5, 101.0) == 0.5
    assert meter.share(5.5, 101.0) == 0.0
    assert meter.share(6.5, 105.0) == 0.25


def test_bounds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^initial_replicas \(3\) must be between min_replicas \(1\) and max_repl"):
        Scaling(1, 2, 3)
