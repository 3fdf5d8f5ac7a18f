"""The order of windows: each of a pass once, as often as its weight says, and the same from wherever one starts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.training.order import WindowOrder

WINDOW = 5


def order(lengths: list[int], weights: list[float], seed: int = 0) -> WindowOrder:
    """Source n holds the numbers from 1000 n on, so that a window says where it comes from."""
    sources = [np.arange(1000 * n, 1000 * n + length, dtype=np.uint32) for n, length in enumerate(lengths)]
    return WindowOrder(sources, weights, WINDOW, seed)


def test_targets_are_the_inputs_one_later() -> None:
    inputs, targets = order([83], [1.0]).batch(3, 4)
    assert inputs.shape == targets.shape == (4, WINDOW)
    assert np.array_equal(inputs + 1, targets)


def test_a_pass_takes_every_window_once_and_the_next_at_another_offset() -> None:
    windows = order([10_00], [1.0])
    passes = [windows.batch(198 * n, 198)[0] for n in range(3)]
    offsets = set()
    for rows in passes:
        starts = np.sort(rows[:, 0])
        assert np.array_equal(np.diff(starts), np.full(197, WINDOW))
        offsets.add(int(starts[0]))
    assert len(offsets) > 1
    assert not np.array_equal(passes[0], passes[1])


def test_weights_are_windows_per_epoch() -> None:
    windows = order([253, 503, 353], [2.0, 0.5, 0.25])
    counts = [49, 99, 69]
    total = Counter((windows.batch(0, 1640)[0][:, 0] // 1000).tolist())
    epochs = windows.epoch_of(1640)
    for source, weight in enumerate([2.0, 0.5, 0.25]):
        assert total[source] == pytest.approx(weight * counts[source] * epochs, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(11, 90), st.sampled_from([0.3, 1.0, 1.7])), min_size=1, max_size=3), st.data())
def test_any_window_can_be_asked_for_first(sources: list[tuple[int, float]], data: st.DataObject) -> None:
    lengths, weights = [length for length, _ in sources], [weight for _, weight in sources]
    if sum(int(w * ((n - 1) // WINDOW - 1)) for n, w in sources) == 0:
        return
    first = data.draw(st.integers(0, 120))
    straight = order(lengths, weights).batch(0, first + 6)[0]
    assert np.array_equal(order(lengths, weights).batch(first, 6)[0], straight[first:])


def test_seeds_differ_and_a_source_may_be_too_short() -> None:
    assert not np.array_equal(order([500], [1.0], 0).batch(0, 20)[0], order([500], [1.0], 1).batch(0, 20)[0])
    with pytest.raises(ValueError, match=r"data\.sources\.1: 10 tokens"):
        order([500, 10], [1.0, 1.0])
