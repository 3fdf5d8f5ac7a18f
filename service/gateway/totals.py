"""Sums over all gateways of what they counted, and what has been added between two such sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from prometheus_client.core import Metric

from service.engine_metrics import PREFIX

Buckets = Sequence[tuple[float, float]]
"""(upper bound, how many values were at most that), in growing order, the last bound being infinity."""


class Totals:
    """Counters and buckets, each summed over all samples of a name."""

    def __init__(self, gateways: Iterable[Sequence[Metric]]) -> None:
        self._values: dict[str, float] = {}
        self._by_reason: dict[tuple[str, str], float] = {}
        self._buckets: dict[str, dict[float, float]] = {}
        for gateway in gateways:
            for family in gateway:
                for sample in family.samples:
                    self._add(sample.name.removeprefix(PREFIX), sample.labels, sample.value)

    def _add(self, name: str, labels: dict[str, str], value: float) -> None:
        if name.endswith("_bucket"):
            buckets = self._buckets.setdefault(name.removesuffix("_bucket"), {})
            bound = float(labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value
            return
        self._values[name] = self._values.get(name, 0.0) + value
        if reason := labels.get("finished_reason") or labels.get("reason"):
            self._by_reason[name, reason] = self._by_reason.get((name, reason), 0.0) + value

    def growth(self, before: Totals, name: str, reason: str | None = None) -> float:
        """How much a counter has grown, of one reason or in all; 0 where it shrank, because a gateway went away."""
        if reason is not None:
            key = name, reason
            return max(self._by_reason.get(key, 0.0) - before._by_reason.get(key, 0.0), 0.0)
        return max(self._values.get(name, 0.0) - before._values.get(name, 0.0), 0.0)

    def buckets_since(self, before: Totals, name: str) -> Buckets:
        """A histogram of the values observed since."""
        then = before._buckets.get(name, {})
        return [(bound, max(n - then.get(bound, 0.0), 0.0)) for bound, n in sorted(self._buckets.get(name, {}).items())]


def quantile(buckets: Buckets, q: float) -> float | None:
    """The q-quantile, values being spread evenly in each bucket; None where there are none.

    As Prometheus' `histogram_quantile`: beyond the last finite bound it is that bound.
    """
    num_values = buckets[-1][1] if buckets else 0.0
    if not num_values:
        return None
    rank, lower, below = q * num_values, 0.0, 0.0
    for bound, at_most in buckets:
        if at_most >= rank:
            if math.isinf(bound):
                return lower
            share = (rank - below) / (at_most - below) if at_most > below else 1.0
            return lower + (bound - lower) * share
        lower, below = bound, at_most
    return lower
