"""How outputs travel from an engine replica to a gateway: one message a step, plain tuples inside, and how they merge.

A tuple costs a tenth of a pickled dataclass on either side, and there is one per running sequence and step.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.errors import EngineDeadError, EngineError
from service.engine.request import FinishReason, RequestOutput, RequestTiming
from service.engine.stats import EngineHealth, EngineInfo, EngineStats

_Token = tuple[str, tuple[int, ...]]
_Final = tuple[str, tuple[int, ...], str, int | None, str | None, tuple[float, float, float] | None]
PackedOutput = _Token | _Final


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a replica is, told unasked about once a second."""

    health: EngineHealth
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Hello:
    """The first item of a gateway's stream: which replica this is and what it serves."""

    replica: str
    info: EngineInfo
    pulse: Pulse


StepMessage = tuple[list[PackedOutput], Pulse | None]
"""Every later item of the stream: what came of the gateway's requests since the one before."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one item of a request's own call, which then lasts until the request has ended."""

    replica: str
    refusal: EngineError | None = None


class StreamError(EngineDeadError):
    """A gateway's stream from this replica is missing where it is needed, or there where it was to be opened."""


Item = Hello | StepMessage | Verdict


def pack(output: RequestOutput) -> PackedOutput:
    """`output` as a tuple of builtins."""
    if output.finish_reason is None:
        return output.request_id, output.new_token_ids
    timing = output.timing
    return (
        output.request_id,
        output.new_token_ids,
        output.finish_reason.value,
        output.stop_token_id,
        output.error,
        (timing.queued_s, timing.prefill_s, timing.decode_s) if timing else None,
    )


def unpack(packed: PackedOutput) -> RequestOutput:
    """The inverse of `pack`."""
    if len(packed) == 2:
        return RequestOutput(*packed)
    request_id, ids, reason, stop_token_id, error, timing = packed
    return RequestOutput(
        request_id, ids, FinishReason(reason), stop_token_id, error, RequestTiming(*timing) if timing else None
    )


def merge(first: RequestOutput | None, then: RequestOutput) -> RequestOutput:
    """Two outputs of one request, in their order, as one."""
    if first is None:
        return then
    return RequestOutput(
        then.request_id,
        first.new_token_ids + then.new_token_ids,
        then.finish_reason,
        then.stop_token_id,
        then.error,
        then.timing,
    )
