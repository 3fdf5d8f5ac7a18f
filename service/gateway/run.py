"""The choices of one completion while the engine generates them. Knows text and measures, no HTTP."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from model.tokenizer import Tokenizer
from service.engine.request import FinishReason
from service.gateway.choice import Choice, Delta
from service.gateway.errors import GenerationFailedError
from service.gateway.merge import Arrival, OutputMerge
from service.gateway.plan import CompletionPlan
from service.metrics import GatewayMetrics

logger = logging.getLogger(__name__)


class _Progress:
    """When a choice's tokens came, on the clock of `time.perf_counter`."""

    __slots__ = ("first_s", "last_s")

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s = 0.0


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
        self._choices = [Choice(i, request, tokenizer, plan.stops) for i, request in enumerate(plan.requests)]
        self._progress = [_Progress() for _ in plan.requests]
        self._num_unfinished = len(plan.requests)
        self._is_accepted = False

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    def usage(self) -> dict[str, int]:
        """The tokens of this request so far. A prompt counts once, however many choices continue it."""
        prompt, completion = self._plan.num_prompt_tokens, sum(choice.num_tokens for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def log_fields(self) -> dict[str, object]:
        """What a log line says of this run."""
        usage = self.usage()
        fields: dict[str, object] = {
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish": ",".join(choice.finish_reason or "unfinished" for choice in self._choices),
        }
        firsts = [progress.first_s for progress in self._progress if progress.first_s is not None]
        if firsts:
            fields["ttft_ms"] = round((min(firsts) - self._started_s) * 1000, 1)
        return fields

    async def next(self) -> list[Delta]:
        """Waits for the engine; what is new since the last call, at most one delta for each choice, maybe none.

        Raises what the engine client raised, or GenerationFailedError.
        """
        arrivals = await self._merge.take()
        self._accept()
        touched: dict[int, Choice] = {}
        num_tokens = 0
        for arrival in arrivals:
            choice = self._choices[arrival.stream_index]
            if not choice.is_finished:  # Else it was dropped while this output was on its way.
                num_tokens += len(arrival.output.new_token_ids)
                self._feed(choice, arrival)
                touched[arrival.stream_index] = choice
        self._metrics.generation_tokens.inc(num_tokens)
        return [delta for choice in touched.values() if (delta := choice.take()) is not None]

    def settle(self, reason: FinishReason) -> None:
        """Counts the choices that did not finish, for `reason`, if the engine ever accepted them."""
        if not self._is_accepted:
            return
        for choice in self._choices:
            if not choice.is_finished:
                self._count(choice, reason)
        self._is_accepted = False

    def _accept(self) -> None:
        if not self._is_accepted:
            self._is_accepted = True
            self._metrics.prompt_tokens.inc(self._plan.num_prompt_tokens)

    def _feed(self, choice: Choice, arrival: Arrival) -> None:
        output = arrival.output
        if output.new_token_ids:
            self._clock(self._progress[arrival.stream_index], arrival.at_s)
        try:
            choice.feed(output)
        except GenerationFailedError:
            logger.error("request %s: the engine failed: %s", self._plan.request_id, output.error)  # noqa: TRY400
            raise
        if choice.is_finished:
            if not output.is_finished:
                self._merge.drop(arrival.stream_index)
            self._num_unfinished -= 1
            assert choice.finish_reason is not None
            self._count(choice, choice.finish_reason)
            if output.timing is not None:
                self._metrics.timed(output.timing)

    def _clock(self, progress: _Progress, at_s: float) -> None:
        if progress.first_s is None:
            progress.first_s = at_s
            self._metrics.ttft.observe(at_s - self._started_s)
        else:
            self._metrics.itl.observe(at_s - progress.last_s)
        progress.last_s = at_s

    def _count(self, choice: Choice, reason: FinishReason) -> None:
        progress = self._progress[choice.index]
        num_prompt_tokens = len(self._plan.requests[choice.index].prompt_token_ids)
        e2e_s = max(progress.last_s - self._started_s, 0.0)
        self._metrics.finished(reason, num_prompt_tokens, choice.num_tokens, e2e_s)
        if progress.first_s is not None and choice.num_tokens > 1:
            self._metrics.tpot.observe((progress.last_s - progress.first_s) / (choice.num_tokens - 1))


def whole_choices(deltas: Sequence[Delta], num_choices: int) -> list[Delta]:
    """One delta for each choice, as if all its text had come at once."""
    whole = [Delta(i, "", None, None, None) for i in range(num_choices)]
    texts: list[list[str]] = [[] for _ in whole]
    ids: list[list[int]] = [[] for _ in whole]
    for delta in deltas:
        texts[delta.choice_index].append(delta.text)
        ids[delta.choice_index].extend(delta.token_ids or ())
        whole[delta.choice_index] = delta
    return [
        delta._replace(text="".join(texts[i]), token_ids=None if delta.token_ids is None else tuple(ids[i]))
        for i, delta in enumerate(whole)
    ]
