"""What a gateway measures, in Prometheus' terms. Names and meaning follow vLLM's, with the prefix `mosaic_`.

A "request" here is one choice: what the engine sees. HTTP requests are counted apart. Knows no HTTP and no engine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engine.request import RequestTiming
from service.engine.stats import EngineInfo, EngineStats

PREFIX = "mosaic_"

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


class TokenHistogram(Collector):
    """A histogram without labels that is cheap enough to observe at every token. For one thread only."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        total, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class EngineCollector(Collector):
    """Turns the last snapshots of the engine replicas into metrics. `snapshots` is None while the engine is silent."""

    def __init__(self) -> None:
        self.snapshots: Sequence[EngineStats] | None = None

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            PREFIX + "engine_up", "Whether the engine answered this scrape.", value=self.snapshots is not None
        )
        for name, documentation, attribute in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, documentation, labels=["replica"])
            for stats in self.snapshots or ():
                gauge.add_metric([stats.replica], getattr(stats, attribute))
            yield gauge
        for name, documentation, attribute in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, documentation, labels=["replica"])
            for stats in self.snapshots or ():
                counter.add_metric([stats.replica], getattr(stats, attribute))
            yield counter
        yield self._memory_usage()

    def _memory_usage(self) -> Metric:
        usage = GaugeMetricFamily(PREFIX + "memory_usage_ratio", "Memory blocks in use, 0 to 1.", labels=["replica"])
        for stats in self.snapshots or ():
            used = stats.num_blocks - stats.num_free_blocks
            usage.add_metric([stats.replica], used / stats.num_blocks if stats.num_blocks else 0.0)
        return usage


_GAUGES = (
    ("num_requests_running", "Requests being generated.", "num_running"),
    ("num_requests_waiting", "Requests that wait for their turn.", "num_waiting"),
    ("num_memory_blocks", "Memory blocks in all.", "num_blocks"),
    ("num_free_memory_blocks", "Memory blocks that nobody uses.", "num_free_blocks"),
    ("num_state_slots", "State slots in all.", "num_slots"),
    ("num_free_state_slots", "State slots that nobody uses.", "num_free_slots"),
    ("engine_start_up_seconds", "Time the replica took to load.", "start_up_s"),
)
_COUNTERS = (
    ("engine_steps", "Steps of the engine.", "num_steps"),
    ("engine_prompt_tokens", "Prompt tokens computed, those computed again after a preemption included.",
     "num_prompt_tokens"),
    ("engine_generation_tokens", "Tokens sampled.", "num_generated_tokens"),
    ("num_preemptions", "Times a running request lost its memory to another.", "num_preemptions"),
    ("engine_aborted", "Requests ended by their client.", "num_aborted"),
    ("engine_step_seconds", "Time spent in steps.", "step_time_s"),
    ("engine_forward_seconds", "Time spent in the model.", "forward_time_s"),
    ("engine_idle_seconds", "Time spent without work.", "idle_time_s"),
)  # fmt: skip


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own. For the event loop's thread only."""

    def __init__(self, info: EngineInfo, version: str) -> None:
        self.registry = CollectorRegistry()
        self._engine = EngineCollector()
        self.registry.register(self._engine)
        self._declare_http()
        self._declare_requests()
        self._declare_latencies()
        build = {"version": version, "dtype": info.dtype, "memory_dtype": info.memory_dtype, "device": info.device}
        build |= {"kernel_path": info.kernel_path, "fingerprint": info.fingerprint[:12]}
        labels = list(build)
        Gauge(PREFIX + "build_info", "What runs here; always 1.", labels, registry=self.registry).labels(**build).set(1)

    def render(self, snapshots: Sequence[EngineStats] | None) -> bytes:
        """All metrics in Prometheus' text format, with `snapshots` of the engine, None where it did not answer."""
        self._engine.snapshots = snapshots
        return generate_latest(self.registry)

    def http_finished(self, method: str, route: str, status: int, duration_s: float) -> None:
        """One HTTP exchange has ended. `route` is a template, so that clients cannot make up labels."""
        self._http_requests.labels(method, route, str(status)).inc()
        self._http_duration.labels(method, route).observe(duration_s)

    def rejected(self, reason: str) -> None:
        """A completion was refused before it began; `reason` is the error's code."""
        self._rejected.labels(reason).inc()

    def finished(self, reason: str, num_prompt_tokens: int, num_tokens: int, e2e_s: float) -> None:
        """A request has ended, `reason` being a finish reason."""
        self._success.labels(reason).inc()
        self._prompt_length.observe(num_prompt_tokens)
        self._generation_length.observe(num_tokens)
        self.e2e.observe(e2e_s)

    def timed(self, timing: RequestTiming) -> None:
        """What the engine says of a request's time."""
        self._queue.observe(timing.queued_s)
        self._prefill.observe(timing.prefill_s)
        self._decode.observe(timing.decode_s)

    def _declare_http(self) -> None:
        self._http_requests = Counter(
            PREFIX + "http_requests", "HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self._http_duration = self._histogram(
            "http_request_duration_seconds", "From an HTTP request's head to its answer's end.", ["method", "route"]
        )
        self._rejected = Counter(
            PREFIX + "requests_rejected",
            "Completions refused before they began, by error code.",
            ["reason"],
            registry=self.registry,
        )

    def _declare_requests(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens received from the engine.")
        self.cancelled = self._counter("requests_cancelled", "Completions whose client went away.")
        self._success = Counter(
            PREFIX + "request_success", "Requests that ended, by reason.", ["finished_reason"], registry=self.registry
        )
        for reason in ("stop", "length", "deadline", "abort", "error"):
            self._success.labels(reason)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt length.", buckets=TOKENS)
        self._generation_length = self._histogram("request_generation_tokens", "Tokens generated.", buckets=TOKENS)

    def _declare_latencies(self) -> None:
        self.ttft = self._histogram("time_to_first_token_seconds", "From the HTTP request's head to the first token.")
        self.itl = TokenHistogram(
            PREFIX + "inter_token_latency_seconds",
            "Between a request's consecutive tokens, as they reach the gateway.",
            TOKEN_SECONDS,
            self.registry,
        )
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first.",
            buckets=TOKEN_SECONDS,
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "From the HTTP request's head to the last token.")
        self._queue = self._histogram("request_queue_time_seconds", "Time waiting for the engine.")
        self._prefill = self._histogram("request_prefill_time_seconds", "Time from the queue to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "Time from the first token to the last.")

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(PREFIX + name, documentation, registry=self.registry)

    def _histogram(
        self, name: str, documentation: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        return Histogram(PREFIX + name, documentation, labels, buckets=buckets, registry=self.registry)
