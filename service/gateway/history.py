"""The last minutes of the service, sampled from the same numbers that Prometheus is given, for whoever opens a page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from service.engine.stats import EngineStats
from service.gateway.survey import Survey, Surveyor
from service.gateway.totals import Buckets, Totals, quantile
from service.metrics import REFUSALS

logger = logging.getLogger(__name__)

PERIOD_S = 2.0
NUM_SAMPLES = 450
# Rates and percentiles of a sample are those of the last few samples together: one alone has too few requests.
_SPAN = 5

PHASES = ("gateway", "queue", "prefill", "decode", "stream")
_QUANTILES = (0.5, 0.9, 0.99)
_RATES = {
    "generation_tokens": "generation_tokens_total",
    "prompt_tokens": "prompt_tokens_total",
    "requests": "request_success_total",
    "cancelled": "requests_cancelled_total",
}

Sample = dict[str, object]


@dataclass(frozen=True, slots=True)
class _Moment:
    """What had been counted by a time on the clock of `time.monotonic`."""

    at_s: float
    totals: Totals
    replicas: dict[str, EngineStats]


class History:
    """A ring of samples, each with a number that only grows. For the event loop's thread only."""

    def __init__(self) -> None:
        self._moments: deque[_Moment] = deque(maxlen=_SPAN + 1)
        self._samples: deque[Sample] = deque(maxlen=NUM_SAMPLES)
        self._num_samples = 0

    def since(self, number: int) -> list[Sample]:
        """The samples numbered above `number`, oldest first."""
        num_new = min(max(self._num_samples - number, 0), len(self._samples))
        return list(self._samples)[len(self._samples) - num_new :]

    def record(self, found: Survey, at_s: float) -> None:
        """Adds a sample: what `found` says of the time since the surveys before it."""
        replicas = {stats.replica: stats for stats in found.replicas or ()}
        self._moments.append(_Moment(at_s, Totals(found.gateways), replicas))
        self._num_samples += 1
        sample = {"number": self._num_samples, "time": round(time.time(), 1), "up": found.replicas is not None}
        first, last = self._moments[0], self._moments[-1]
        self._samples.append(sample | _now(last) | _served(first, last) | _computed(first, last))

    async def run(self, surveyor: Surveyor) -> None:
        """Samples for as long as the task is not cancelled."""
        while True:
            try:
                self.record(await surveyor.survey(max_age_s=PERIOD_S), time.monotonic())
            except Exception:
                logger.exception("the service could not be sampled")
            await asyncio.sleep(PERIOD_S)


def _now(moment: _Moment) -> Sample:
    replicas = moment.replicas.values()
    num_blocks = sum(stats.num_blocks for stats in replicas)
    num_free = sum(stats.num_free_blocks for stats in replicas)
    return {
        "running": sum(stats.num_running for stats in replicas),
        "waiting": sum(stats.num_waiting for stats in replicas),
        "replicas": len(replicas),
        "memory": _short(1 - num_free / num_blocks) if num_blocks else 0,
    }


def _served(first: _Moment, last: _Moment) -> Sample:
    """Rates, percentiles and mean phases of what the gateways served between two moments."""
    span_s = max(last.at_s - first.at_s, 1e-9)
    sample: Sample = {
        name: _short(last.totals.growth(first.totals, counter) / span_s) for name, counter in _RATES.items()
    }
    failed = last.totals.growth(first.totals, "request_success_total", "error")
    refused = sum(last.totals.growth(first.totals, "requests_rejected_total", reason) for reason in REFUSALS)
    sample |= {"failed": _short(failed / span_s), "refused": _short(refused / span_s)}
    for name, histogram in (
        ("ttft", "time_to_first_token_seconds"),
        ("itl", "inter_token_latency_seconds"),
        ("e2e", "e2e_request_latency_seconds"),
    ):
        sample[name] = _quantiles(last.totals.buckets_since(first.totals, histogram))
    num_ended = last.totals.growth(first.totals, "e2e_request_latency_seconds_count")
    sample["phases"] = [
        _short(last.totals.growth(first.totals, f"request_{phase}_time_seconds_sum") / num_ended) if num_ended else None
        for phase in PHASES
    ]
    return sample


def _quantiles(buckets: Buckets) -> list[float | None]:
    return [None if (value := quantile(buckets, q)) is None else _short(value) for q in _QUANTILES]


def _computed(first: _Moment, last: _Moment) -> Sample:
    """What the engine replicas did between two moments."""
    span_s = max(last.at_s - first.at_s, 1e-9)
    pairs = [(first.replicas.get(name, EngineStats(name)), stats) for name, stats in last.replicas.items()]
    num_steps = sum(now.num_steps - then.num_steps for then, now in pairs)
    step_s = sum(now.step_time_s - then.step_time_s for then, now in pairs)
    num_seqs = sum(now.batch_sizes.total - then.batch_sizes.total for then, now in pairs)
    return {
        "batch": _short(num_seqs / num_steps) if num_steps > 0 else 0,
        "step": _short(step_s / num_steps) if num_steps > 0 else None,
        "busy": _short(min(step_s / span_s / len(pairs), 1.0)) if pairs else 0,
    }


def replica_rows(replicas: Sequence[EngineStats]) -> list[Sample]:
    """The replicas of this moment, one by one."""
    return [
        {
            "name": stats.replica,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "blocks": stats.num_blocks,
            "free_blocks": stats.num_free_blocks,
            "slots": stats.num_slots,
            "free_slots": stats.num_free_slots,
            "tokens": stats.num_generated_tokens,
            "steps": stats.num_steps,
            "step_s": _short(stats.step_time_s),
            "preemptions": stats.num_preemptions,
            "start_up_s": _short(sum(seconds for _, seconds in stats.start_up)),
        }
        for stats in replicas
    ]


def _short(value: float) -> float:
    """Four digits are more than a chart shows."""
    return float(f"{value:.4g}")
