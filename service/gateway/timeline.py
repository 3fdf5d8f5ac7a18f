"""Engine steps and requests as Chrome trace events, the JSON that Perfetto and chrome://tracing draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from service.engine.inspection import Inspection
from service.engine.meter import StepRecord
from service.engine.record import RequestRecord

Event = dict[str, object]

_STEPS_TRACK = 1
_FIRST_REQUEST_TRACK = 2


def trace_events(inspections: Sequence[Inspection]) -> Iterator[Event]:
    """One process for each replica: a track of steps, counters, and as many tracks of requests as ran side by side.

    Times are microseconds of Unix time, so that replicas on several machines share one axis.
    """
    for pid, inspection in enumerate(inspections, start=1):
        yield _name("process_name", pid, 0, f"engine {inspection.replica}")
        yield _name("thread_name", pid, _STEPS_TRACK, "steps")
        clock = _Clock(inspection)
        for step in inspection.steps:
            yield from _step_events(step, pid, clock)
        yield from _request_events(inspection.finished, pid, clock)


class _Clock:
    """From seconds on an engine's clock to microseconds of Unix time."""

    def __init__(self, inspection: Inspection) -> None:
        self._offset_s = inspection.time_s - inspection.now_s

    def __call__(self, at_s: float) -> int:
        return round((at_s + self._offset_s) * 1e6)

    def span(self, start_s: float, end_s: float) -> dict[str, int]:
        start = self(start_s)
        return {"ts": start, "dur": max(self(end_s) - start, 0)}


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _step_events(step: StepRecord, pid: int, clock: _Clock) -> Iterator[Event]:
    where = {"ph": "X", "pid": pid, "tid": _STEPS_TRACK}
    kind = "prefill" if step.num_tokens > step.num_seqs else "decode"
    args = {"requests": step.num_seqs, "tokens": step.num_tokens, "prompt_tokens": step.num_prompt_tokens}
    yield {"name": kind, "cat": "step", **where, **clock.span(step.started_s, step.ended_s), "args": args}
    yield {"name": "schedule", "cat": "part", **where, **clock.span(step.started_s, step.planned_s)}
    yield {"name": "forward", "cat": "part", **where, **clock.span(step.planned_s, step.executed_s)}
    yield {"name": "book", "cat": "part", **where, **clock.span(step.executed_s, step.ended_s)}
    counts = {"running": step.num_running, "waiting": step.num_waiting}
    yield {"ph": "C", "name": "requests", "pid": pid, "ts": clock(step.ended_s), "args": counts}
    free = {"free": step.num_free_blocks}
    yield {"ph": "C", "name": "memory blocks", "pid": pid, "ts": clock(step.ended_s), "args": free}


def _request_events(records: Sequence[RequestRecord], pid: int, clock: _Clock) -> Iterator[Event]:
    # Each goes on the first track that is free by then, so that no two overlap and few tracks are needed.
    free_from: list[float] = []
    for record in sorted(records, key=lambda record: record.arrival_s):
        track = next((i for i, free_s in enumerate(free_from) if free_s <= record.arrival_s), len(free_from))
        free_from[track:] = [record.ended_s, *free_from[track + 1 :]]
        yield from _phases(record, pid, _FIRST_REQUEST_TRACK + track, clock)
    for track in range(len(free_from)):
        yield _name("thread_name", pid, _FIRST_REQUEST_TRACK + track, f"requests {track + 1}")


def _phases(record: RequestRecord, pid: int, tid: int, clock: _Clock) -> Iterator[Event]:
    where = {"ph": "X", "pid": pid, "tid": tid}
    args = {
        "finish_reason": record.finish_reason,
        "prompt_tokens": record.num_prompt_tokens,
        "output_tokens": record.num_output_tokens,
        "preemptions": record.num_preemptions,
    }
    span = clock.span(record.arrival_s, record.ended_s)
    yield {"name": record.request_id, "cat": "request", **where, **span, "args": args}
    starts = (
        ("queue", record.arrival_s),
        ("prefill", record.first_scheduled_s),
        ("decode", record.first_token_s),
        ("", record.ended_s),
    )
    reached = [(phase, at_s) for phase, at_s in starts if at_s is not None]
    for (phase, start_s), (_, end_s) in pairwise(reached):
        yield {"name": phase, "cat": "phase", **where, **clock.span(start_s, end_s)}
