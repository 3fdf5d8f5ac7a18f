"""What a measurement says, in the numbers people compare: latencies, throughput, goodput, failures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtests.errors import WorkloadError
from loadtests.load import Measurement
from loadtests.percentile import Distribution
from loadtests.record import Phase, RequestRecord

_LATENCIES: Mapping[str, Callable[[RequestRecord], float | None]] = {
    "ttft": lambda record: record.ttft_s,
    "tpot": lambda record: record.tpot_s,
    "e2e": lambda record: record.e2e_s,
}


@dataclass(frozen=True, slots=True)
class LatencyTarget:
    """What a request has to meet to be good, in milliseconds: any of "ttft", "tpot", "e2e"."""

    limits_ms: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = self.limits_ms.keys() - _LATENCIES.keys()
        if unknown:
            raise WorkloadError(f"no latency {', '.join(sorted(unknown))}; there are {', '.join(_LATENCIES)}")
        if any(not limit > 0 for limit in self.limits_ms.values()):
            raise WorkloadError("a latency target is more than 0 ms")

    def is_met_by(self, record: RequestRecord) -> bool:
        """A latency that a request does not have, such as the time per token of a single token, is no miss."""
        return record.is_success and all(
            (value := _LATENCIES[name](record)) is None or value * 1e3 <= limit
            for name, limit in self.limits_ms.items()
        )


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met the target, as a share of all measured ones and by the second."""

    limits_ms: Mapping[str, float]
    num_good: int
    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One cell. Latencies in milliseconds, over measured requests that succeeded.

    `output_tokens_per_s` counts the tokens that arrived within the window, whichever request they belong to, but for
    failed ones: an event counts as its request's tokens over its request's events, unless the server says more
    exactly. `itl_ms` are the gaps between events with text; where `tokens_per_event` is above 1, a gap stands for
    that many tokens and `tpot_ms` is the time per token. `num_short` requests ended before the length asked for.
    """

    num_requests: int
    num_succeeded: int
    errors: Mapping[str, int]
    num_short: int
    num_without_usage: int
    num_without_text: int
    window_s: float
    output_tokens_per_s: float
    requests_per_s: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int | None
    tokens_per_event: float | None
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    lateness_ms: Distribution | None
    goodput: Goodput | None
    client_us_per_token: float | None

    @property
    def num_failed(self) -> int:
        return self.num_requests - self.num_succeeded

    def described(self) -> dict[str, Any]:
        return asdict(self)


def summarise(measurement: Measurement, *, output_tokens: int, target: LatencyTarget | None = None) -> Summary:
    """`output_tokens` is what each request asked for."""
    measured = measurement.measured
    good = [record for record in measured if record.is_success]
    num_tokens = _tokens_in_window(measurement)
    window_s = measurement.window_s
    return Summary(
        num_requests=len(measured),
        num_succeeded=len(good),
        errors=dict(Counter(record.error for record in measured if record.error is not None)),
        num_short=sum(record.output_tokens < output_tokens for record in good),
        num_without_usage=sum(not record.has_usage for record in good),
        num_without_text=sum(not record.times_s for record in good),
        window_s=window_s,
        output_tokens_per_s=_rate(num_tokens, window_s),
        requests_per_s=_rate(len(good), window_s),
        output_tokens=sum(record.output_tokens for record in good),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in good),
        cached_tokens=_sum_known(record.cached_tokens for record in good),
        tokens_per_event=_tokens_per_event(good),
        ttft_ms=_milliseconds(record.ttft_s for record in good),
        itl_ms=_milliseconds(gap for record in good for gap in record.gaps_s),
        tpot_ms=_milliseconds(record.tpot_s for record in good),
        e2e_ms=_milliseconds(record.e2e_s for record in good),
        lateness_ms=_milliseconds(record.lateness_s for record in good) if measurement.plan.rate else None,
        goodput=None if target is None else _goodput(measured, target, window_s),
        client_us_per_token=measurement.client_cpu_s / num_tokens * 1e6 if num_tokens else None,
    )


def _tokens_in_window(measurement: Measurement) -> float:
    """Tokens that arrived while the window was open, also of warm-up and filler requests that reached into it."""
    records = [record for record in measurement.records if record.is_success]
    usual = _tokens_per_event(records) or 1.0
    cut_off = [record for record in measurement.records if record.phase is Phase.FILLER and not record.is_success]
    return math.fsum(
        weight
        for record in (*records, *cut_off)
        for time_s, weight in _arrivals(record, usual)
        if measurement.opened_s < time_s <= measurement.closed_s
    )


def _arrivals(record: RequestRecord, usual: float) -> Iterable[tuple[float, float]]:
    """(time, tokens) of each event. A stream that was cut off says nothing of its own: there, what is usual."""
    if not record.times_s:
        return [(record.ended_s, record.output_tokens)]
    if record.token_counts is not None:
        return zip(record.times_s, record.token_counts, strict=True)
    weight = record.tokens_per_event or usual
    return [(time_s, weight) for time_s in record.times_s]


def _tokens_per_event(records: list[RequestRecord]) -> float | None:
    num_events = sum(len(record.times_s) for record in records)
    return sum(record.output_tokens for record in records) / num_events if num_events else None


def _goodput(measured: list[RequestRecord], target: LatencyTarget, window_s: float) -> Goodput:
    num_good = sum(target.is_met_by(record) for record in measured)
    return Goodput(dict(target.limits_ms), num_good, _rate(num_good, len(measured)), _rate(num_good, window_s))


def _milliseconds(seconds: Iterable[float | None]) -> Distribution | None:
    return Distribution.of(value * 1e3 for value in seconds if value is not None)


def _sum_known(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _rate(count: float, of: float) -> float:
    return count / of if of > 0 else 0.0
