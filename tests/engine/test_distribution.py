from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from service.engine.distribution import Tally

BOUNDS = (1.0, 2.0, 5.0)


@given(st.lists(st.one_of(st.floats(0, 10), st.sampled_from(BOUNDS)), max_size=50))
def test_values_are_counted_at_the_first_bound_that_holds_them(values: list[float]) -> None:
    tally = Tally(BOUNDS)
    for value in values:
        tally.observe(value)
    found = tally.snapshot()
    edges = [float("-inf"), *BOUNDS, float("inf")]
    assert list(found.counts) == [sum(low < v <= high for v in values) for low, high in pairwise(edges)]
    assert found.num_values == len(values)
    assert found.total == sum(values)


def test_a_snapshot_stays_what_it_was() -> None:
    tally = Tally(BOUNDS)
    before = tally.snapshot()
    tally.observe(1.5)
    assert before.counts == (0, 0, 0, 0)
