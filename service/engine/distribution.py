"""How values spread over fixed bounds, counted as they come. Integers and bisection, cheap enough for every step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Distribution:
    """A snapshot: `counts[i]` values were at most `bounds[i]` and above the bound before; the last are above all.

    `total` is the sum of all values.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0

    @property
    def num_values(self) -> int:
        return sum(self.counts)


NOTHING = Distribution()


class Tally:
    """Counts values into a `Distribution`. One thread observes; any thread may take a snapshot."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def observe_all(self, values: Iterable[float]) -> None:
        """The same for many, in less time."""
        bounds, counts, total = self._bounds, self._counts, self._total
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._total = total

    def snapshot(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._total)
