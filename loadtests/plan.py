"""How a load is put on a server: how many at a time or how often, for how long, and when to give up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loadtests.errors import WorkloadError

MAX_CONCURRENCY = 1024
MAX_REQUESTS = 1_000_000
MAX_RATE = 10_000.0
MAX_CELL_S = 3600.0
MIN_DEFAULT_REQUESTS = 8
DEFAULT_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load. Either `concurrency` users that each send the next request when the last is answered (closed loop),
    or arrivals at `rate` a second whatever the server does (open loop, Poisson).

    Measured are `num_requests`, or the requests sent within `duration_s` after the warm-up. The load stays up until
    the last of them is answered. `max_cell_s` bounds it all; `max_in_flight` bounds an open loop that a server cannot
    keep up with: what would exceed it is not sent, and counted as failed.
    """

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    num_warmup: int = 0
    request_timeout_s: float = 120.0
    max_cell_s: float = 900.0
    max_in_flight: int = 256

    def __post_init__(self) -> None:
        _check((self.concurrency is None) != (self.rate is None), "either a concurrency or a rate")
        _check((self.num_requests is None) != (self.duration_s is None), "either a number of requests or a duration")
        _check_range("concurrency", self.concurrency, 1, MAX_CONCURRENCY)
        _check_range("rate", self.rate, 1e-3, MAX_RATE)
        _check_range("requests", self.num_requests, 1, MAX_REQUESTS)
        _check_range("duration", self.duration_s, 0.1, MAX_CELL_S)
        _check_range("warm-up requests", self.num_warmup, 0, MAX_REQUESTS)
        _check_range("request timeout", self.request_timeout_s, 0.1, MAX_CELL_S)
        _check_range("time per cell", self.max_cell_s, 0.1, MAX_CELL_S)
        _check_range("requests in flight", self.max_in_flight, 1, MAX_CONCURRENCY)

    @property
    def name(self) -> str:
        return f"c{self.concurrency}" if self.concurrency is not None else f"r{self.rate:g}"

    def described(self) -> dict[str, Any]:
        return asdict(self)


def default_num_requests(concurrency: int | None) -> int:
    """A few full rounds of all users, and never so few that a percentile means nothing at all."""
    return max(MIN_DEFAULT_REQUESTS, DEFAULT_ROUNDS * (concurrency or 8))


def _check_range(what: str, value: float | None, low: float, high: float) -> None:
    _check(value is None or low <= value <= high, f"{what}: {low:g} to {high:g}")


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise WorkloadError(message)
