"""One choice of a completion while it is generated: engine outputs in, text out."""

from __future__ import annotations

from typing import NamedTuple

from model.detokenizer import IncrementalDetokenizer
from model.tokenizer import Tokenizer
from service.engine.request import FinishReason, Request, RequestOutput
from service.gateway.errors import GenerationFailedError
from service.gateway.stops import StopFinder, StopSet


class Delta(NamedTuple):
    """What is new of one choice. `token_ids` is None for a model that has text."""

    choice_index: int
    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class Choice:
    """Turns the ids of one engine request into text that ends at its stop strings.

    `num_tokens` counts the tokens up to the one that ended the choice, that one included. Stop strings completed
    before `min_tokens` tokens are text.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None, stops: StopSet | None) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._sampling = request.sampling
        self._detokenizer = IncrementalDetokenizer(tokenizer) if tokenizer else None
        self._finder = StopFinder(stops) if stops else None
        self._text = ""
        self._ids: tuple[int, ...] = ()

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def feed(self, output: RequestOutput) -> None:
        """Takes the next output of the engine. Raises GenerationFailedError where it reports a failure."""
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise GenerationFailedError
        if self._detokenizer is None:
            self.num_tokens += len(output.new_token_ids)
            self._ids += output.new_token_ids
        elif self._finder is None:
            self._feed_text(output, self._detokenizer)
        else:
            self._feed_search(output, self._detokenizer, self._finder)
        if output.finish_reason is not None and not self.is_finished:
            self.finish_reason = output.finish_reason
            is_asked_for = output.stop_token_id in self._sampling.stop_token_ids
            self.stop_reason = output.stop_token_id if is_asked_for else None

    def _feed_text(self, output: RequestOutput, detokenizer: IncrementalDetokenizer) -> None:
        self.num_tokens += len(output.new_token_ids)
        self._text += detokenizer.push(_text_ids(output))
        if output.finish_reason is not None:
            self._text += detokenizer.flush()

    def _feed_search(self, output: RequestOutput, detokenizer: IncrementalDetokenizer, finder: StopFinder) -> None:
        # Token by token, because the one that completes a stop string is the last that counts.
        for token_id in _text_ids(output):
            self.num_tokens += 1
            if self._search(detokenizer.push((token_id,)), finder):
                return
        if output.finish_reason is not None:
            self.num_tokens += output.stop_token_id is not None
            if not self._search(detokenizer.flush(), finder):
                self._text += finder.flush()

    def _search(self, text: str, finder: StopFinder) -> bool:
        free, stop = finder.push(text, is_armed=self.num_tokens >= self._sampling.min_tokens)
        self._text += free
        if stop is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, stop
        return stop is not None

    def take(self) -> Delta | None:
        """What is new since the last call, or None where there is nothing to tell."""
        if not self._text and not self._ids and self.finish_reason is None:
            return None
        ids = None if self._detokenizer else self._ids
        delta = Delta(self.index, self._text, ids, self.finish_reason, self.stop_reason)
        self._text, self._ids = "", ()
        return delta


def _text_ids(output: RequestOutput) -> tuple[int, ...]:
    """The new ids that are text: the token that stopped a choice is counted, but not shown."""
    return output.new_token_ids if output.stop_token_id is None else output.new_token_ids[:-1]
