"""What engine replicas tell of themselves, in Prometheus' terms. Knows their snapshots alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from service.engine.distribution import Distribution
from service.engine.stats import EngineStats, Fleet

PREFIX = "mosaic_"

_GAUGES = (
    ("num_requests_running", "Requests being generated.", "num_running"),
    ("num_requests_waiting", "Requests that wait for their turn.", "num_waiting"),
    ("prefix_cache_blocks", "Complete blocks that the prefix cache can find, in use or not.", "num_cached_blocks"),
    ("backlog_seconds", "How long full batches take for all tokens that requests here have still to get.", "backlog_s"),
    ("swapped_blocks", "Blocks that wait outside of the memory cache.", "num_swapped_blocks"),
    ("prefix_cache_snapshots", "States that the prefix cache can go on from.", "num_snapshots"),
)
_COUNTERS = (
    ("engine_steps", "Steps of the engine.", "num_steps"),
    ("engine_prompt_tokens", "Prompt tokens computed, those computed again after a preemption included.",
     "num_prompt_tokens"),
    ("engine_generation_tokens", "Tokens sampled.", "num_generated_tokens"),
    ("num_preemptions", "Times a running request lost its memory to another.", "num_preemptions"),
    ("num_resumptions", "Times a preempted request got memory again.", "num_resumptions"),
    ("prefix_cache_queries", "Tokens that the prefix cache was asked about.", "num_queried_tokens"),
    ("prefix_cache_hits", "Tokens that it had, and that were not computed.", "num_hit_tokens"),
    ("prefix_cache_evictions", "Blocks that it had to forget, or to swap out.", "num_evictions"),
    ("swapped_out_blocks", "Blocks moved out of the memory cache.", "num_swap_outs"),
    ("swapped_in_blocks", "Blocks moved back into it.", "num_swap_ins"),
    ("engine_aborted", "Requests ended by their client.", "num_aborted"),
    ("engine_step_seconds", "Time spent in steps.", "step_time_s"),
    ("engine_forward_seconds", "Time spent in the model.", "forward_time_s"),
    ("engine_work_seconds", "Time that the tokens computed take in full batches; its rate is the share in use.",
     "work_s"),
    ("engine_idle_seconds", "Time spent without work.", "idle_time_s"),
)  # fmt: skip


def engine_families(snapshots: Sequence[EngineStats] | None, fleet: Fleet | None) -> Iterator[Metric]:
    """The metrics of all replicas, labelled with their names. `snapshots` is None where the engine was silent, `fleet`
    where nobody knows.
    """
    yield GaugeMetricFamily(
        PREFIX + "engine_up", "Whether the engine answered this scrape.", value=float(snapshots is not None)
    )
    replicas = snapshots or ()
    yield GaugeMetricFamily(PREFIX + "num_engine_replicas", "Engine replicas that answered.", value=len(replicas))
    wanted = GaugeMetricFamily(
        PREFIX + "num_engine_replicas_wanted", "Engine replicas that there should be, those that start included."
    )
    if fleet is not None:
        wanted.add_metric([], fleet.num_wanted)
    yield wanted
    for name, documentation, attribute in _GAUGES:
        gauge = GaugeMetricFamily(PREFIX + name, documentation, labels=["replica"])
        for stats in replicas:
            gauge.add_metric([stats.replica], getattr(stats, attribute))
        yield gauge
    for name, documentation, attribute in _COUNTERS:
        counter = CounterMetricFamily(PREFIX + name, documentation, labels=["replica"])
        for stats in replicas:
            counter.add_metric([stats.replica], getattr(stats, attribute))
        yield counter
    yield _queue_depth(replicas)
    yield from _tokens(replicas)
    yield from _memory(replicas)
    yield from _steps(replicas)
    yield _start_up(replicas)


def _queue_depth(replicas: Sequence[EngineStats]) -> Metric:
    depth = GaugeMetricFamily(
        PREFIX + "queue_depth", "Requests that wait, by the API key they came with.", labels=["replica", "key"]
    )
    for stats in replicas:
        keyed = {key: num_waiting for key, _, num_waiting in stats.by_key}
        # Requests without a key are always told of, so that there is a zero where nobody waits.
        for key, num_waiting in {"": max(stats.num_waiting - sum(keyed.values()), 0), **keyed}.items():
            depth.add_metric([stats.replica, key], num_waiting)
    return depth


def _tokens(replicas: Sequence[EngineStats]) -> Iterator[Metric]:
    pending = GaugeMetricFamily(
        PREFIX + "pending_tokens",
        "Tokens still to be computed, of requests that wait and that run, as far as can be expected.",
        labels=["replica", "state"],
    )
    capacity = GaugeMetricFamily(
        PREFIX + "capacity_tokens_per_second",
        "What full batches come to, as measured: prompts absorbed, or tokens generated.",
        labels=["replica", "kind"],
    )
    for stats in replicas:
        pending.add_metric([stats.replica, "queued"], stats.num_queued_tokens)
        pending.add_metric([stats.replica, "running"], stats.num_running_tokens)
        capacity.add_metric([stats.replica, "prompt"], stats.prompt_tokens_per_s)
        capacity.add_metric([stats.replica, "generation"], stats.generation_tokens_per_s)
    return iter((pending, capacity))


def _memory(replicas: Sequence[EngineStats]) -> Iterator[Metric]:
    blocks = GaugeMetricFamily(
        PREFIX + "memory_blocks", "Memory blocks; cached ones nobody uses just now.", labels=["replica", "state"]
    )
    slots = GaugeMetricFamily(PREFIX + "state_slots", "State slots, by state.", labels=["replica", "state"])
    usage = GaugeMetricFamily(PREFIX + "memory_usage_ratio", "Memory blocks in use, 0 to 1.", labels=["replica"])
    for stats in replicas:
        used = stats.num_blocks - stats.num_free_blocks
        blocks.add_metric([stats.replica, "used"], used)
        blocks.add_metric([stats.replica, "cached"], stats.num_idle_blocks)
        blocks.add_metric([stats.replica, "free"], stats.num_free_blocks - stats.num_idle_blocks)
        slots.add_metric([stats.replica, "used"], stats.num_slots - stats.num_free_slots)
        slots.add_metric([stats.replica, "free"], stats.num_free_slots)
        usage.add_metric([stats.replica], used / stats.num_blocks if stats.num_blocks else 0.0)
    return iter((blocks, slots, usage))


def _steps(replicas: Sequence[EngineStats]) -> Iterator[Metric]:
    seconds = HistogramMetricFamily(
        PREFIX + "engine_step_duration_seconds",
        "Time of one step; a prefill step absorbs more than one token of some request.",
        labels=["replica", "kind"],
    )
    batch = HistogramMetricFamily(PREFIX + "engine_batch_size", "Requests in one step.", labels=["replica"])
    tokens = HistogramMetricFamily(PREFIX + "engine_step_tokens", "Tokens absorbed in one step.", labels=["replica"])
    for stats in replicas:
        _add(seconds, [stats.replica, "decode"], stats.decode_steps_s)
        _add(seconds, [stats.replica, "prefill"], stats.prefill_steps_s)
        _add(batch, [stats.replica], stats.batch_sizes)
        _add(tokens, [stats.replica], stats.step_tokens)
    return iter((seconds, batch, tokens))


def _add(family: HistogramMetricFamily, labels: Sequence[str], values: Distribution) -> None:
    family.add_metric(labels, buckets=cumulated(values), sum_value=values.total)


def cumulated(values: Distribution) -> list[tuple[str, float]]:
    """Buckets as Prometheus has them: how many values were at most each bound, the last being infinity."""
    total, buckets = 0, []
    for bound, count in zip([*map(str, values.bounds), "+Inf"], values.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def _start_up(replicas: Sequence[EngineStats]) -> Metric:
    start_up = GaugeMetricFamily(
        PREFIX + "engine_start_up_seconds", "How long loading took, by phase.", labels=["replica", "phase"]
    )
    for stats in replicas:
        for phase, seconds in stats.start_up:
            start_up.add_metric([stats.replica, phase], seconds)
    return start_up
