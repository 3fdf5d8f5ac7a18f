"""What became of one request, in numbers. Frozen, and small enough to keep every one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any


class Phase(StrEnum):
    """What a request was sent for. Only measured ones are counted; fillers keep the load up until those have ended."""

    WARMUP = "warmup"
    MEASURED = "measured"
    FILLER = "filler"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. Times in seconds; `started_s` and `times_s` on `perf_counter`, durations from `started_s`.

    `times_s` are the arrivals of the events that carried text. `output_tokens` is the server's usage, or the number
    of those events where it sent none (`has_usage`). `error` is None exactly if the whole answer came; else a short
    kind that can be counted ("http_503", "disconnected", "timeout"), with the server's words in `message`.
    `lateness_s` is how long after its planned arrival an open-loop request was sent.
    """

    index: int
    phase: Phase
    started_s: float
    e2e_s: float
    times_s: tuple[float, ...] = ()
    token_counts: tuple[int, ...] | None = None
    output_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    has_usage: bool = False
    finish_reason: str | None = None
    status: int | None = None
    error: str | None = None
    message: str | None = None
    lateness_s: float = 0.0

    @property
    def is_success(self) -> bool:
        return self.error is None

    @property
    def ended_s(self) -> float:
        return self.started_s + self.e2e_s

    @property
    def ttft_s(self) -> float | None:
        """Time to the first event with text."""
        return self.times_s[0] - self.started_s if self.times_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between events with text."""
        return [after - before for before, after in pairwise(self.times_s)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first, by the server's count: events may carry several."""
        if self.output_tokens < 2 or len(self.times_s) < 2:
            return None
        return (self.times_s[-1] - self.times_s[0]) / (self.output_tokens - 1)

    @property
    def tokens_per_event(self) -> float | None:
        return self.output_tokens / len(self.times_s) if self.times_s and self.is_success else None

    def described(self, origin_s: float, *, with_events: bool = False) -> dict[str, Any]:
        """For a results file; times in milliseconds, counted from `origin_s`."""
        fields: dict[str, Any] = {
            "index": self.index,
            "phase": self.phase.value,
            "started_ms": _ms(self.started_s - origin_s),
            "e2e_ms": _ms(self.e2e_s),
            "ttft_ms": _ms(self.ttft_s),
            "tpot_ms": _ms(self.tpot_s),
            "lateness_ms": _ms(self.lateness_s),
            "num_events": len(self.times_s),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "has_usage": self.has_usage,
            "finish_reason": self.finish_reason,
            "status": self.status,
            "error": self.error,
            "message": self.message,
        }
        if with_events:
            fields["events_ms"] = [_ms(time - self.started_s) for time in self.times_s]
            fields["event_tokens"] = self.token_counts
        return fields


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
