"""What an operator sees on looking into an engine: who is in it, who holds which block, what its latest steps did."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.meter import StepRecord
from service.engine.record import RequestRecord
from service.engine.scheduler import Scheduler
from service.engine.sequence import RequestStatus, Sequence


@dataclass(frozen=True, slots=True)
class RequestState:
    """One request that runs or waits. Times are seconds: in all, and in each phase so far."""

    request_id: str
    key_id: str
    priority: int
    phase: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    num_blocks: int
    num_preemptions: int
    age_s: float
    queued_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """One replica at one moment, `now_s` on its clock and `time_s` as a Unix time.

    `requests` are those that run, in the order of their admission, then those that wait. `blocks` has a byte for each
    memory block, see `BlockHolders.map`. `steps` and `finished` are those of the span asked for.
    """

    replica: str
    now_s: float
    time_s: float
    requests: tuple[RequestState, ...]
    blocks: bytes
    steps: tuple[StepRecord, ...] = ()
    finished: tuple[RequestRecord, ...] = ()


def inspect_requests(scheduler: Scheduler, now_s: float) -> tuple[tuple[RequestState, ...], bytes]:
    """The requests of a scheduler and the map of its blocks. Any thread may ask, even while the engine is stuck: what
    it says of a request is then true, but not of one moment.
    """
    # Copying a list runs no Python code, so that the stepping thread cannot get between.
    sequences = (*list(scheduler.running), *_waiting(scheduler))
    return tuple(_state(sequence, now_s) for sequence in sequences), scheduler.blocks.map()


def _waiting(scheduler: Scheduler) -> list[Sequence]:
    for _ in range(100):
        try:
            return list(scheduler.waiting)
        except RuntimeError:  # changed by the stepping thread meanwhile
            continue
    return []


def _state(sequence: Sequence, now_s: float) -> RequestState:
    timing = sequence.timing(now_s)
    started = "decode" if sequence.first_token_s is not None else "prefill"
    return RequestState(
        request_id=sequence.request_id,
        key_id=sequence.request.key_id,
        priority=sequence.request.priority,
        phase=started if sequence.status is RequestStatus.RUNNING else "queue",
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_output_tokens=sequence.num_output_tokens,
        num_computed_tokens=sequence.num_computed_tokens,
        num_blocks=len(sequence.block_table),
        num_preemptions=sequence.num_preemptions,
        age_s=now_s - sequence.arrival_s,
        queued_s=timing.queued_s,
        prefill_s=timing.prefill_s,
        decode_s=timing.decode_s,
    )
