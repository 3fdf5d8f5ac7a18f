"""The choices of one completion while the engine generates them. Knows text and measures, no HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import chain

from model.tokenizer import Tokenizer
from service.engine.errors import FatalRequestError
from service.engine.grammar import FAULT
from service.engine.request import FinishReason, RequestTiming
from service.gateway.choice import Choice, Delta
from service.gateway.errors import BadRequestError, GenerationFailedError
from service.gateway.merge import Arrival, OutputMerge
from service.gateway.plan import CompletionPlan
from service.metrics import GatewayMetrics, Phases

logger = logging.getLogger(__name__)


class _Progress:
    """When a choice's tokens came, on the clock of `time.perf_counter`, and what the engine said of its time."""

    __slots__ = ("first_s", "is_timed_to_end", "last_s", "timing")

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s = 0.0
        self.timing = RequestTiming(0.0, 0.0, 0.0)
        self.is_timed_to_end = False

    @property
    def decode_s(self) -> float:
        """The engine's own measure where the engine ended the choice; where we did, the same as seen from here."""
        if self.is_timed_to_end or self.first_s is None:
            return self.timing.decode_s
        return self.last_s - self.first_s


class CompletionRun:
    """Turns what arrives from the engine into new text, choice by choice, and counts it.

    `started_s` is when the HTTP request came, on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        plan: CompletionPlan,
        merge: OutputMerge,
        tokenizer: Tokenizer | None,
        metrics: GatewayMetrics,
        started_s: float,
    ) -> None:
        self._plan = plan
        self._merge = merge
        self._metrics = metrics
        self._started_s = started_s
        self._submitted_s = time.perf_counter()
        self.choices = [Choice(i, r, tokenizer, plan.stops, plan.shape) for i, r in enumerate(plan.requests)]
        self._progress = [_Progress() for _ in plan.requests]
        self._num_unfinished = len(plan.requests)
        self._num_resumptions = 0
        self.system_fingerprint = ""
        self._undelivered: list[Choice] = []
        self._is_accepted = False

    @property
    def is_accepted(self) -> bool:
        """Whether the engine has answered."""
        return self._is_accepted

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    @property
    def num_tokens(self) -> int:
        """The tokens of this request so far. A prompt counts once, however many choices continue it."""
        return self._plan.num_prompt_tokens + sum(choice.num_tokens for choice in self.choices)

    def usage(self) -> dict[str, object]:
        """The same as clients are told it."""
        prompt, total = self._plan.num_prompt_tokens, self.num_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": total - prompt,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens()},
        }

    def _num_cached_tokens(self) -> int:
        """Of each prompt what its first choice found: the others found what that one had left behind."""
        found, n = [choice.num_cached_tokens or 0 for choice in self.choices], self._plan.num_choices
        return sum(min(found[i : i + n]) for i in range(0, len(found), n))

    def log_fields(self) -> dict[str, object]:
        """What a log line says of this run."""
        usage = self.usage()
        fields: dict[str, object] = {
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish": ",".join(choice.finish_reason or "unfinished" for choice in self.choices),
        }
        if self._num_resumptions:
            fields["resumptions"] = self._num_resumptions
        firsts = [progress.first_s for progress in self._progress if progress.first_s is not None]
        if firsts:
            fields["ttft_ms"] = _ms(min(firsts) - self._started_s)
            slowest = max(self._progress, key=lambda progress: progress.last_s)
            fields["queue_ms"] = _ms(slowest.timing.queued_s)
            fields["prefill_ms"] = _ms(slowest.timing.prefill_s)
            fields["decode_ms"] = _ms(slowest.decode_s)
        return fields

    async def next(self) -> list[Delta]:
        """Waits for the engine; what is new since the last call, at most one delta for each choice, maybe none.

        Poking the merge ends the wait.

        Raises what the engine client raised, GenerationFailedError, FatalRequestError where engines were lost to it, or
        BadRequestError where its grammar failed it.
        """
        arrivals = await self._merge.take()
        if arrivals and not self._is_accepted:
            self._accept()
        touched: dict[int, Choice] = {}
        num_tokens = 0
        for arrival in arrivals:
            index, output, _ = arrival
            choice = self.choices[index]
            if choice.finish_reason is None:  # Else it was dropped while this output was on its way.
                num_tokens += len(output.new_token_ids)
                if output.system_fingerprint and not self.system_fingerprint:
                    self.system_fingerprint = output.system_fingerprint
                if output.num_resumptions:
                    self._resumed(output.num_resumptions)
                self._feed(choice, arrival)
                touched[index] = choice
        self._metrics.generation_tokens.inc(num_tokens)
        return [delta for choice in touched.values() if (delta := choice.take()) is not None]

    def delivered(self) -> None:
        """All that `next` gave so far is on its way to the client: counts the choices that have ended with it."""
        if not self._undelivered:  # as after nearly every token
            return
        for choice in self._undelivered:
            assert choice.finish_reason is not None
            self._count(choice, choice.finish_reason)
        self._undelivered.clear()

    def settle(self, reason: FinishReason) -> None:
        """Counts the choices that did not finish, for `reason`, if the engine ever accepted them."""
        self.delivered()
        if not self._is_accepted:
            return
        for choice in self.choices:
            if not choice.is_finished:
                self._count(choice, reason)
        self._is_accepted = False

    def _accept(self) -> None:
        self._is_accepted = True
        self._metrics.prompt_tokens.inc(self._plan.num_prompt_tokens)

    def _resumed(self, num_resumptions: int) -> None:
        self._num_resumptions += num_resumptions
        self._metrics.resumptions.inc(num_resumptions)

    def _feed(self, choice: Choice, arrival: Arrival) -> None:
        index, output, at_s = arrival
        progress = self._progress[index]
        if output.new_token_ids:
            self._clock(progress, at_s)
        if output.timing is not None:
            progress.timing = output.timing
            progress.is_timed_to_end = output.is_finished
        try:
            choice.feed(output)
        except GenerationFailedError:
            if output.error is not None and output.error.startswith(FAULT) and self._plan.asked_grammar is not None:
                param = self._plan.asked_grammar.param
                raise BadRequestError(output.error, param=param, code="grammar_too_complex") from None
            logger.error("request %s: the engine failed: %s", self._plan.request_id, output.error)  # noqa: TRY400
            if output.error == FatalRequestError.MESSAGE:
                raise FatalRequestError from None
            raise
        if choice.finish_reason is not None:
            if not output.is_finished:
                self._merge.drop(index)
            self._num_unfinished -= 1
            self._undelivered.append(choice)

    def _clock(self, progress: _Progress, at_s: float) -> None:
        if progress.first_s is None:
            progress.first_s = at_s
            self._metrics.ttft.observe(at_s - self._started_s)
        else:
            self._metrics.itl.observe(at_s - progress.last_s)
        progress.last_s = at_s

    def _count(self, choice: Choice, reason: FinishReason) -> None:
        progress = self._progress[choice.index]
        request = self._plan.requests[choice.index]
        phases = self._phases(progress, time.perf_counter())
        self._metrics.finished(reason, len(request.prompt_token_ids), choice.num_tokens, phases, request.key_id)
        if progress.first_s is not None and choice.num_tokens > 1:
            self._metrics.tpot.observe((progress.last_s - progress.first_s) / (choice.num_tokens - 1))

    def _phases(self, progress: _Progress, now_s: float) -> Phases:
        queue_s, prefill_s, decode_s = progress.timing.queued_s, progress.timing.prefill_s, progress.decode_s
        elsewhere_s = now_s - self._submitted_s - queue_s - prefill_s - decode_s
        return Phases(self._submitted_s - self._started_s, queue_s, prefill_s, decode_s, max(elsewhere_s, 0.0))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def whole_choices(deltas: Sequence[Delta], num_choices: int) -> list[Delta]:
    """One delta for each choice, as if all its text had come at once."""
    parts: list[list[Delta]] = [[] for _ in range(num_choices)]
    for delta in deltas:
        parts[delta.choice_index].append(delta)
    return [_joined(pieces) for pieces in parts]


def _joined(pieces: Sequence[Delta]) -> Delta:
    last = pieces[-1]
    return last._replace(
        text="".join([piece.text for piece in pieces]),
        token_ids=None if last.token_ids is None else tuple(chain.from_iterable(p.token_ids or () for p in pieces)),
        scored=None if last.scored is None else tuple(chain.from_iterable(p.scored or () for p in pieces)),
    )
