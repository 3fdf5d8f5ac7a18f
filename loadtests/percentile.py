"""Order statistics of a sample. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile of a non-empty ascending sample, between neighbours by straight line.

    The definition of `statistics.quantiles(..., method="inclusive")` and of NumPy's default: the smallest value is
    the 0th percentile, the largest the 100th.
    """
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A sample in eight numbers, in the unit of the sample."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, sample: Iterable[float]) -> Distribution | None:
        """None of an empty sample: nothing was measured, and that is not zero."""
        ordered = sorted(sample)
        if not ordered:
            return None
        p50, p90, p95, p99 = (percentile(ordered, percent) for percent in (50, 90, 95, 99))
        mean = math.fsum(ordered) / len(ordered)
        return cls(len(ordered), mean, ordered[0], p50, p90, p95, p99, ordered[-1])
