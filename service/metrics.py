"""What a gateway measures, in Prometheus' terms. Names and meaning follow vLLM's, with the prefix `mosaic_`.

A "request" here is one choice: what the engine sees. HTTP requests are counted apart. Every sample carries the name
of the gateway that counted it, so that one scrape can tell of several and sums are true. Knows no HTTP and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.engine.stats import EngineInfo, EngineStats, Fleet
from service.engine_metrics import PREFIX, engine_families
from service.instruments import Counter, Family, Gauge, Histogram, Labels, S

# Seconds. Small models answer within a few milliseconds, so that is where the buckets are finest.
SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)
TOKEN_SECONDS = (
    *(0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02),
    *(0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)
TOKENS = tuple(float(2**power) for power in range(16))

# Refusals that say something of the server, not of the request: there from the start, so that a rate finds a zero.
REFUSALS = ("overloaded", "draining", "engine_dead", "internal_error")
# A client's own excess, not a failing of the server.
_LIMITED = ("rate_limit_exceeded",)
_FINISHES = ("stop", "length", "deadline", "abort", "error")


@dataclass(frozen=True, slots=True)
class Phases:
    """Where a request's time went, in seconds; together they are its whole time, from the HTTP request's head to the
    moment its last text was on its way.

    `gateway`: read, checked and tokenized. `queue`, `prefill` and `decode` are the engine's. `stream`: what remains, on
    the way to the engine and back, turning ids into text and writing to the client.
    """

    gateway: float
    queue: float
    prefill: float
    decode: float
    stream: float

    @property
    def total(self) -> float:
        return self.gateway + self.queue + self.prefill + self.decode + self.stream


class GatewayMetrics:
    """The metrics of one gateway. For the event loop's thread only.

    `gateway` is its name, different for each gateway of the same engines.
    """

    def __init__(self, info: EngineInfo, version: str, gateway: str) -> None:
        self.gateway = gateway
        self._collectors: list[Callable[[], Metric]] = []
        self._declare_http()
        self._declare_requests()
        self._declare_keys()
        self._declare_latencies()
        self._declare_phases()
        self._start_up = self._gauge("start_up_seconds", "From the launch to the first request taken.")
        build = {"version": version, "dtype": info.dtype, "memory_dtype": info.memory_dtype, "device": info.device}
        build |= {"kernel_path": info.kernel_path, "fingerprint": info.fingerprint[:12]}
        self._gauges("build_info", "What runs here; always 1.", *build).of(*build.values()).set(1)

    def families(self) -> list[Metric]:
        """All metrics of this gateway now. They can be pickled and belong to the caller, but for their labels."""
        return [collect() for collect in self._collectors]

    def http_finished(self, method: str, route: str, status: int, duration_s: float) -> None:
        """One HTTP exchange has ended. `route` is a template, so that clients cannot make up labels."""
        self._http_requests.of(method, route, str(status)).inc()
        self._http_duration.of(method, route).observe(duration_s)

    def rejected(self, reason: str, key: str = "") -> None:
        """A completion was refused before it began; `reason` is the error's code, `key` the id of its API key."""
        self._rejected.of(reason).inc()
        self._key_rejected.of(key).inc()

    def finished(self, reason: str, num_prompt_tokens: int, num_tokens: int, phases: Phases, key: str = "") -> None:
        """A request has ended, `reason` being a finish reason and `key` the id of its API key."""
        self._success.of(reason).inc()
        self._key_requests.of(key).inc()
        self._key_prompt_tokens.of(key).inc(num_prompt_tokens)
        self._key_generation_tokens.of(key).inc(num_tokens)
        self._prompt_length.observe(num_prompt_tokens)
        self._generation_length.observe(num_tokens)
        self._e2e.observe(phases.total)
        self._gateway_time.observe(phases.gateway)
        self._queue_time.observe(phases.queue)
        self._prefill_time.observe(phases.prefill)
        self._decode_time.observe(phases.decode)
        self._stream_time.observe(phases.stream)

    def started(self, seconds: float) -> None:
        """The server is ready, so many seconds after it was launched."""
        self._start_up.set(seconds)

    def _declare_http(self) -> None:
        self._http_requests = self._counters("http_requests", "HTTP requests.", "method", "route", "status")
        self._http_duration = self._family(
            partial(Histogram, bounds=SECONDS),
            "histogram",
            "http_request_duration_seconds",
            "From an HTTP request's head to its answer's end.",
            ("method", "route"),
        )
        self._rejected = self._counters(
            "requests_rejected", "Completions refused before they began, by error code.", "reason"
        )
        for reason in (*REFUSALS, *_LIMITED):
            self._rejected.of(reason)

    def _declare_requests(self) -> None:
        self.in_flight = self._gauge("num_completions_in_flight", "Completions accepted and not yet answered.")
        self.draining = self._gauge("draining", "Whether new completions are refused because this gateway ends.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens received from the engine.")
        self.resumptions = self._counter(
            "request_resumptions", "Times a request went on at another replica because its own was lost."
        )
        self.cancelled = self._counter("requests_cancelled", "Completions whose client went away.")
        self._success = self._counters("request_success", "Requests that ended, by reason.", "finished_reason")
        for reason in _FINISHES:
            self._success.of(reason)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt length.", TOKENS)
        self._generation_length = self._histogram("request_generation_tokens", "Tokens generated.", TOKENS)

    def _declare_keys(self) -> None:
        self._key_requests = self._counters("key_requests", "Requests that ended, by API key.", "key")
        self._key_prompt_tokens = self._counters("key_prompt_tokens", "Their prompt tokens, by API key.", "key")
        self._key_generation_tokens = self._counters("key_generation_tokens", "Their new tokens, by API key.", "key")
        self._key_rejected = self._counters("key_rejected", "Completions refused, by API key.", "key")
        for counter in (self._key_requests, self._key_prompt_tokens, self._key_generation_tokens, self._key_rejected):
            counter.of("")  # of requests without one

    def _declare_latencies(self) -> None:
        self.ttft = self._histogram("time_to_first_token_seconds", "From the HTTP request's head to the first token.")
        self.itl = self._histogram(
            "inter_token_latency_seconds",
            "Between a request's consecutive tokens, as they reach the gateway.",
            TOKEN_SECONDS,
        )
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first.",
            TOKEN_SECONDS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From the HTTP request's head until its last text is on its way."
        )

    def _declare_phases(self) -> None:
        self._gateway_time = self._histogram(
            "request_gateway_time_seconds", "From the HTTP request's head until the engine is asked."
        )
        self._queue_time = self._histogram("request_queue_time_seconds", "Time waiting in the engine.")
        self._prefill_time = self._histogram("request_prefill_time_seconds", "Time from the queue to the first token.")
        self._decode_time = self._histogram("request_decode_time_seconds", "Time from the first token to the last.")
        self._stream_time = self._histogram(
            "request_stream_time_seconds", "All other time: the way to the engine and back, and writing to the client."
        )

    def _counter(self, name: str, documentation: str) -> Counter:
        return self._counters(name, documentation).of()

    def _counters(self, name: str, documentation: str, *names: str) -> Family[Counter]:
        return self._family(Counter, "counter", name, documentation, names)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return self._gauges(name, documentation).of()

    def _gauges(self, name: str, documentation: str, *names: str) -> Family[Gauge]:
        return self._family(Gauge, "gauge", name, documentation, names)

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float] = SECONDS) -> Histogram:
        return self._family(partial(Histogram, bounds=bounds), "histogram", name, documentation).of()

    def _family(
        self, create: Callable[[str, Labels], S], kind: str, name: str, documentation: str, names: Sequence[str] = ()
    ) -> Family[S]:
        family = Family(create, kind, PREFIX + name, documentation, {"gateway": self.gateway}, names)
        self._collectors.append(family.collect)
        return family


def render(
    gateways: Iterable[Sequence[Metric]], snapshots: Sequence[EngineStats] | None, fleet: Fleet | None = None
) -> bytes:
    """Everything in Prometheus' text format: what each gateway measured, and `snapshots` of the engine replicas, None
    where the engine did not answer.
    """
    return generate_latest(Families([*merged(gateways), *engine_families(snapshots, fleet)]))


def merged(gateways: Iterable[Sequence[Metric]]) -> list[Metric]:
    """The metrics of several gateways as one list of families. Adds to the families of the first."""
    families: dict[str, Metric] = {}
    for gateway in gateways:
        for family in gateway:
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples += family.samples
    return list(families.values())


class Families(Collector):
    """Metrics as they are, for whoever wants a collector."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
