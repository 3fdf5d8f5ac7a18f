"""How outputs travel from an engine replica to a gateway: one message a step, plain tuples inside, and how they merge.

A plain tuple of two is pickled in a fraction of the time, and there is one per running sequence and step.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.errors import EngineDeadError, EngineError
from service.engine.request import RequestOutput, TokenLogprob
from service.engine.stats import EngineHealth, EngineInfo, EngineStats

_Ids = tuple[str, tuple[int, ...]]
_Scored = tuple[str, tuple[int, ...], tuple[tuple[int, float, int, tuple[tuple[int, float], ...]], ...]]
PackedOutput = _Ids | _Scored | RequestOutput


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


@dataclass(frozen=True, slots=True)
class StepMessage:
    """Every later item of the stream: what came of the gateway's requests since the one before.

    `log` are lines of the replica's log at warning and above, whose files are out of an operator's sight.
    """

    outputs: list[PackedOutput]
    pulse: Pulse | None = None
    log: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one item of a request's own call, which then lasts until the request has ended.

    `system_fingerprint` is the engine's that took it.
    """

    replica: str
    refusal: EngineError | None = None
    system_fingerprint: str = ""


class StreamError(EngineDeadError):
    """A gateway's stream from this replica is missing where it is needed, or there where it was to be opened."""


Item = Hello | StepMessage | Verdict


def pack(output: RequestOutput) -> PackedOutput:
    """`output` as a plain tuple where it has nothing but tokens, as nearly all after the first have."""
    is_more = output.finish_reason is not None or output.timing is not None or output.prompt_logprobs is not None
    is_rare = output.is_engine_failure or output.num_resumptions or output.system_fingerprint
    if is_more or is_rare or output.num_cached_tokens:
        return output
    if not output.logprobs:
        return output.request_id, output.new_token_ids
    scores = tuple((score.token_id, score.logprob, score.rank, score.top) for score in output.logprobs)
    return output.request_id, output.new_token_ids, scores


def unpack(packed: PackedOutput) -> RequestOutput:
    """The inverse of `pack`."""
    if isinstance(packed, RequestOutput):
        return packed
    if len(packed) == 2:
        return RequestOutput(*packed)
    request_id, ids, scores = packed
    return RequestOutput(request_id, ids, logprobs=tuple(TokenLogprob(*score) for score in scores))


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
        then.timing or first.timing,
        first.logprobs + then.logprobs,
        first.prompt_logprobs if then.prompt_logprobs is None else then.prompt_logprobs,
        first.num_cached_tokens or then.num_cached_tokens,
        then.is_engine_failure,
        first.num_resumptions + then.num_resumptions,
        first.system_fingerprint or then.system_fingerprint,
    )
