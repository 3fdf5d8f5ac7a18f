"""What crosses from a gateway to an engine and back: token ids and a few numbers, never text or tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    `seed` is fixed by the gateway, so that a request resumed on another replica continues identically: token
    number `i` of a request is a function of (`seed`, `choice_index`, `i`) and of the text before it alone.
    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the respective filter off.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice_index: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to generate.

    `output_token_ids` are ids generated for this request earlier, elsewhere: they count towards `max_tokens` and are
    part of the context, but they are not generated again.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Where the time went, in seconds on the engine's clock."""

    queued_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one engine step produced for one request.

    `new_token_ids` includes the stop token, if one ended the request; `stop_token_id` names it. `error` is set with
    `FinishReason.ERROR` alone. `timing` comes with the terminal output.
    """

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    timing: RequestTiming | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
