"""A request inside the engine: its tokens so far, how many are absorbed, and what memory it holds."""

from __future__ import annotations

import math
from enum import StrEnum

from service.engine.request import FinishReason, Request, RequestTiming, TokenLogprob
from service.engine.token_counts import TokenCounts


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Mutable state of one request.

    There is no phase flag: `num_computed_tokens` chases `num_tokens`. A new prompt, a chunk of one, a decode step and
    a restart after preemption differ only in the distance between the two. `num_cached_tokens` of the prompt had been
    absorbed by others. `place` is the waiting queue's; `seniority` counts admissions, and is None before the first.
    `fork_point`, the number of tokens before the last one known when it began to wait, `branch_point`, how many it has
    in common with another where that is worth a state, else 0, and the keys are the prefix cache's. `short_table`, in a
    network with a short-term memory, has None where its block was let go. `token_counts` are there once somebody asked
    for `counts`.
    """

    __slots__ = (
        "arrival_s",
        "block_keys",
        "block_table",
        "branch_point",
        "finish_reason",
        "first_scheduled_s",
        "first_token_s",
        "fork_point",
        "is_plainly_greedy",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "place",
        "prompt_logprobs",
        "request",
        "seniority",
        "short_table",
        "slot",
        "status",
        "stop_token_id",
        "tail_keys",
        "token_counts",
        "token_ids",
    )

    def __init__(self, request: Request, arrival_s: float) -> None:
        self.request = request
        self.status = RequestStatus.WAITING
        self.token_ids: list[int] = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.is_plainly_greedy = request.sampling.is_plainly_greedy
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.num_cached_tokens: int | None = None
        self.block_table: list[int] = []
        self.short_table: list[int | None] = []
        self.slot: int | None = None
        self.place = (0, 0)
        self.seniority: int | None = None
        self.block_keys: list[bytes] = []
        self.fork_point = self.num_tokens - 1
        self.branch_point = 0
        self.tail_keys: dict[int, bytes] = {}
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        self.token_counts: TokenCounts | None = None
        self.arrival_s = arrival_s
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def deadline_s(self) -> float:
        """When its time is up, on the clock of `arrival_s`."""
        timeout_s = self.request.timeout_s
        return math.inf if timeout_s is None else self.arrival_s + timeout_s

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Ids generated so far, those brought along from elsewhere included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def counts(self) -> TokenCounts:
        """Of the tokens known, those written so far counted; the same object each time, kept up to date."""
        if self.token_counts is None:
            self.token_counts = TokenCounts(self.request.prompt_token_ids, self.output_token_ids)
        return self.token_counts

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt tokens absorbed now are to be told about: not again after a preemption."""
        return self.request.sampling.num_prompt_logprobs is not None and self.first_token_s is None

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """What was learnt of the prompt, when its end is reached for the first time; None if nobody asked."""
        return tuple(self.prompt_logprobs) if self.wants_prompt_logprobs else None

    def skip(self, num_tokens: int) -> None:
        """Its first `num_tokens` tokens have been absorbed by others: it goes on from there."""
        self.num_computed_tokens = num_tokens
        if self.first_token_s is None:
            # After a preemption it may find what it had absorbed itself, or miss what it had found.
            before = self.num_prompt_tokens if self.num_cached_tokens is None else self.num_cached_tokens
            self.num_cached_tokens = min(num_tokens, before)

    def rewind(self) -> None:
        """It has lost its memory, and waits."""
        self.num_computed_tokens = 0
        self.prompt_logprobs.clear()
        self.status = RequestStatus.WAITING
        self.fork_point = self.num_tokens - 1
        self.branch_point = 0

    def append(self, token_id: int, now_s: float, eos_token_id: int | None, *, is_complete: bool = False) -> None:
        """Takes a sampled token and decides whether it ends the request: it does where the text `is_complete`."""
        self.token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)
        if self.first_token_s is None:
            self.first_token_s = now_s
        sampling, num_output_tokens = self.request.sampling, self.num_output_tokens
        if is_complete or num_output_tokens >= sampling.min_tokens:
            is_eos = token_id == eos_token_id and (is_complete or not sampling.ignore_eos)
            if is_eos or token_id in sampling.stop_token_ids:
                self.finish_reason = FinishReason.STOP
                self.stop_token_id = token_id
                return
        if is_complete:
            self.finish_reason = FinishReason.STOP
        elif num_output_tokens >= sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH

    def timing(self, now_s: float) -> RequestTiming:
        """Splits the time from arrival to `now_s` into waiting, prefill (to the first token) and decode."""
        scheduled_s = now_s if self.first_scheduled_s is None else self.first_scheduled_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return RequestTiming(
            queued_s=scheduled_s - self.arrival_s,
            prefill_s=first_token_s - scheduled_s,
            decode_s=now_s - first_token_s,
        )
