"""What crosses from a gateway to an engine and back: token ids, a few numbers and a grammar, never tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from service.engine.bad_words import BadWords
from service.engine.grammar import Grammar


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    `seed` is fixed by the gateway, so that a request resumed on another replica continues identically: token
    number `i` of a request is a function of (`seed`, `choice_index`, `i`) and of the text before it alone.
    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `typical_p` 1 and `min_p` 0 switch the respective filter off.

    `repetition_penalty` divides positive logits of tokens seen in prompt or output, and multiplies negative ones;
    `presence_penalty` is taken from the logits of tokens in the output, `frequency_penalty` once per occurrence.
    `logit_bias` adds to logits. `allowed_token_ids` forbids all others. A token that completes one of the `bad_words`
    is forbidden. `num_logprobs` asks for each generated token's log probability and those of so many likeliest ones,
    or those of `logprob_token_ids` instead, `num_prompt_logprobs` for the prompt's; None asks for neither.
    With `max_tokens` 0 the prompt alone is of interest.

    Only what `grammar` allows is drawn, whatever else is asked for; a text that it lets go no further ends there.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice_index: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: BadWords | None = None
    num_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def is_plainly_greedy(self) -> bool:
        """Whether always the likeliest token is drawn, and nothing else is asked about it."""
        is_limited = self.min_tokens > 0 or self.allowed_token_ids is not None or self.bad_words is not None
        is_changed = self.has_penalty or bool(self.logit_bias) or self.grammar is not None
        return self.temperature == 0 and self.num_logprobs is None and not (is_limited or is_changed)

    @property
    def has_penalty(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def mentioned_token_ids(self) -> tuple[int, ...]:
        """Every id these parameters speak of."""
        biased = tuple(token_id for token_id, _ in self.logit_bias)
        words = self.bad_words.token_ids if self.bad_words else ()
        return (*self.stop_token_ids, *biased, *words, *(self.allowed_token_ids or ()), *self.logprob_token_ids)


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to generate.

    `output_token_ids` are ids generated for this request earlier, elsewhere: they count towards `max_tokens` and are
    part of the context, but they are not generated again.

    Of two that wait, the one with the lower `priority` goes first, within the bounds of `WaitingQueue`. Prompts share
    cached memory only where `cache_salt` is the same. `timeout_s` seconds after it was handed over a request ends with
    `FinishReason.DEADLINE`, wherever it is: a span, not a time, because the clocks of gateway and engine need not
    agree. `key_id` names whose share of the engine it takes, and `weight` how large that is beside the others'.
    Requests of one `session_id` had better go to one engine; it is empty where they belong to none. `trace_context` is
    the W3C `traceparent` of the span it belongs to, empty where nobody traces. One that `is_resumed` was accepted
    before by an engine that was lost: it is not refused for want of room.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None
    key_id: str = ""
    trace_context: str = ""
    weight: int = 1
    is_resumed: bool = False
    session_id: str = ""

    @property
    def max_num_tokens(self) -> int:
        """Tokens of the prompt and of the longest completion allowed."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    def later(self, seconds: float) -> Request:
        """The same request with `seconds` less time left."""
        return self if self.timeout_s is None else replace(self, timeout_s=max(self.timeout_s - seconds, 0.0))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the network thought of one token, before any temperature, penalty or filter.

    `rank` is 1 for the likeliest. `top` are the likeliest tokens with their log probabilities, in order, or the tokens
    that were asked for, of which one that is never drawn has minus infinity.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Where the time went, in seconds on the engine's clock: from arrival to the first place in a step, from there to
    the first token, from there to now. What a preemption costs later is part of decoding.
    """

    queued_s: float
    prefill_s: float
    decode_s: float


class RequestOutput(NamedTuple):
    """What one engine step produced for one request. A tuple, because one is made for every token.

    `new_token_ids` includes the stop token, if one ended the request; `stop_token_id` names it. `error` is set with
    `FinishReason.ERROR` alone. `timing` comes with the first output and with the terminal one. `logprobs` has one entry
    per new token where they were asked for; `prompt_logprobs`, one per prompt token after the first, comes with the
    first output, as does `num_cached_tokens`, how many prompt tokens were found absorbed already. An error that
    `is_engine_failure` is no fault of the request's. `num_resumptions` is how often another engine took the request
    over since the output before. `system_fingerprint` is the engine's, with the first output where engines may differ.
    """

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    timing: RequestTiming | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    num_cached_tokens: int = 0
    is_engine_failure: bool = False
    num_resumptions: int = 0
    system_fingerprint: str = ""

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
