"""What is worth keeping of a request that has ended: when it reached what, and how much it was."""

from __future__ import annotations

from typing import NamedTuple

from service.engine.sequence import Sequence


class RequestRecord(NamedTuple):
    """A request that has ended. Times are seconds on the engine's clock, None for what it never reached."""

    request_id: str
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_preemptions: int
    arrival_s: float
    first_scheduled_s: float | None
    first_token_s: float | None
    ended_s: float


def record_of(sequence: Sequence, ended_s: float) -> RequestRecord:
    """What is worth keeping of a request that has ended."""
    return RequestRecord(
        sequence.request_id,
        str(sequence.finish_reason),
        sequence.num_prompt_tokens,
        sequence.num_output_tokens,
        sequence.request.sampling.max_tokens,
        sequence.num_preemptions,
        sequence.arrival_s,
        sequence.first_scheduled_s,
        sequence.first_token_s,
        ended_s,
    )
