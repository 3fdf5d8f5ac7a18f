"""Counters, gauges and histograms that are cheap to record at every token and cheap to collect. For one thread only.

Prometheus' own take a lock for each value, and make the labels of every sample anew whenever they are collected, which
the dashboard's history sees to every two seconds. Here they are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from service.engine.distribution import Tally

Labels = dict[str, str]


class Series(Protocol):
    """What has one set of labels."""

    def samples(self) -> Sequence[Sample]:
        """As it is now. Samples share their labels, which are not to be changed."""
        ...


S = TypeVar("S", bound=Series)


class Counter:
    """A number that only grows."""

    def __init__(self, name: str, labels: Labels) -> None:
        self._name = name + "_total"
        self._labels = labels
        self._value = 0.0

    def inc(self, amount: float = 1) -> None:
        self._value += amount

    def samples(self) -> Sequence[Sample]:
        return [Sample(self._name, self._labels, self._value)]


class Gauge:
    """A number that is set, or asked for with `read` when it is wanted."""

    def __init__(self, name: str, labels: Labels) -> None:
        self._name = name
        self._labels = labels
        self.read: Callable[[], float] = float

    def set(self, value: float) -> None:
        self.read = lambda: value

    def samples(self) -> Sequence[Sample]:
        return [Sample(self._name, self._labels, float(self.read()))]


class Histogram:
    """How many values were at most each of `bounds`. Values wait in a list until they are collected."""

    def __init__(self, name: str, labels: Labels, bounds: Sequence[float]) -> None:
        self._name = name
        self._labels = labels
        self._bucket_labels = [{**labels, "le": bound} for bound in [*map(str, bounds), "+Inf"]]
        self._tally = Tally(bounds)
        self._observed: list[float] = []
        self.observe = self._observed.append

    def samples(self) -> Sequence[Sample]:
        self._tally.observe_all(self._observed)
        self._observed.clear()
        values, bucket = self._tally.snapshot(), self._name + "_bucket"
        up_to = accumulate(values.counts)
        return [
            *[Sample(bucket, labels, float(n)) for labels, n in zip(self._bucket_labels, up_to, strict=True)],
            Sample(self._name + "_count", self._labels, float(values.num_values)),
            Sample(self._name + "_sum", self._labels, values.total),
        ]


class Family(Generic[S]):
    """All series of one name, told apart by the values of `names`; each has `labels` beside them.

    `create` makes a series from the name and all its labels. `kind` is Prometheus' word for it.
    """

    def __init__(
        self,
        create: Callable[[str, Labels], S],
        kind: str,
        name: str,
        documentation: str,
        labels: Labels,
        names: Sequence[str] = (),
    ) -> None:
        self._create = create
        self._kind = kind
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._names = names
        self._series: dict[tuple[str, ...], S] = {}

    def of(self, *values: str) -> S:
        """The series with these values, which is there from now on."""
        series = self._series.get(values)
        if series is None:
            own = zip(self._names, map(str, values), strict=True)
            series = self._series[values] = self._create(self._name, {**self._labels, **dict(own)})
        return series

    def collect(self) -> Metric:
        """As it is now, to be kept by the caller."""
        metric = Metric(self._name, self._documentation, self._kind)
        metric.samples = [sample for series in self._series.values() for sample in series.samples()]
        return metric
