"""One choice of a completion while it is generated: engine outputs in, text out."""

from __future__ import annotations

from typing import NamedTuple

from model.detokenizer import IncrementalDetokenizer
from model.tokenizer import Tokenizer
from service.engine.request import FinishReason, Request, RequestOutput, TokenLogprob
from service.gateway.errors import GenerationFailedError
from service.gateway.logprobs import ScoredToken, ScoreTrack, limited
from service.gateway.shape import PLAIN, AnswerShape
from service.gateway.stops import StopFinder, StopSet


class Delta(NamedTuple):
    """What is new of one choice. `token_ids` and `scored` are None where nobody asked for them."""

    choice_index: int
    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    scored: tuple[ScoredToken, ...] | None = None


class Choice:
    """Turns the ids of one engine request into text that ends at its stop strings.

    `num_tokens` counts the tokens up to the one that ended the choice, that one included. Stop strings completed
    before `min_tokens` tokens are text, and so is the prompt that is echoed. A model without a tokenizer has no text.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer | None,
        stops: StopSet | None,
        shape: AnswerShape = PLAIN,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._request = request
        self._shape = shape
        self._has_ids = shape.has_token_ids or tokenizer is None
        self._detokenizer = IncrementalDetokenizer(tokenizer, shape.skip_special) if tokenizer else None
        self._finder = StopFinder(stops) if stops else None
        self._track = None if shape.num_logprobs is None else ScoreTrack()
        # Both for the track alone: characters read, and of these those that were taken.
        self._num_chars = 0
        self._num_taken = 0
        self._text = ""
        self._ids: tuple[int, ...] = ()

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def feed(self, output: RequestOutput) -> None:
        """Takes the next output of the engine. Raises GenerationFailedError where it reports a failure."""
        reason = output.finish_reason
        if reason is FinishReason.ERROR or reason is FinishReason.ABORT:
            raise GenerationFailedError
        if self.num_cached_tokens is None:
            self._begin(output)
        if self._finder is None and self._track is None:
            self._feed_all(output)
        else:
            self._feed_each(output)
        if reason is not None and self.finish_reason is None:
            self.finish_reason = reason
            is_asked_for = output.stop_token_id in self._request.sampling.stop_token_ids
            self.stop_reason = output.stop_token_id if is_asked_for else None

    def _begin(self, output: RequestOutput) -> None:
        """What the first output alone tells, and the prompt."""
        self.num_cached_tokens = output.num_cached_tokens
        self.prompt_logprobs = output.prompt_logprobs
        if not self._shape.echo:
            return
        ids = self._request.prompt_token_ids
        # After a deadline in the queue nothing is known of the prompt.
        known = output.prompt_logprobs or (None,) * (len(ids) - 1)
        for token_id, score in zip(ids, (None, *known), strict=True):
            self._text += self._read(token_id, score and limited(score, self._shape.num_logprobs or 0))

    def _feed_all(self, output: RequestOutput) -> None:
        self.num_tokens += len(output.new_token_ids)
        if self._has_ids:
            self._ids += output.new_token_ids
        if self._detokenizer is not None:
            self._text += self._detokenizer.push(self._text_ids(output))
            if output.finish_reason is not None:
                self._text += self._detokenizer.flush()

    def _feed_each(self, output: RequestOutput) -> None:
        # Token by token, because the one that completes a stop string is the last that counts.
        shown = self._text_ids(output)
        scores = output.logprobs if self._track is not None else (None,) * len(output.new_token_ids)
        for token_id, score in zip(shown, scores[: len(shown)], strict=True):
            self._count(token_id)
            if self._let_through(self._read(token_id, score)):
                return
        if output.finish_reason is None:
            return
        rest = self._detokenizer.flush() if self._detokenizer else ""
        self._num_chars += len(rest)
        for token_id, score in zip(output.new_token_ids[len(shown) :], scores[len(shown) :], strict=True):
            self._count(token_id)
            if self._track is not None:
                self._track.add(token_id, score, self._num_chars)
        if not self._let_through(rest) and self._finder is not None:
            self._text += self._finder.flush()

    def _count(self, token_id: int) -> None:
        self.num_tokens += 1
        if self._has_ids:
            self._ids += (token_id,)

    def _read(self, token_id: int, score: TokenLogprob | None) -> str:
        """The text that a token completes."""
        if self._track is None:
            return self._detokenizer.push((token_id,)) if self._detokenizer else ""
        lead, text = self._detokenizer.push_one(token_id) if self._detokenizer else (0, "")
        self._track.add(token_id, score, self._num_chars + lead)
        self._num_chars += len(text)
        return text

    def _let_through(self, text: str) -> bool:
        """Adds what is certain of `text` to the answer; whether a stop string has ended it."""
        if self._finder is None:
            self._text += text
            return False
        free, stop = self._finder.push(text, is_armed=self.num_tokens >= self._request.sampling.min_tokens)
        self._text += free
        if stop is None:
            return False
        self.finish_reason, self.stop_reason = FinishReason.STOP, stop
        if self._shape.include_stop:
            self._text += stop
        return True

    def take(self) -> Delta | None:
        """What is new since the last call, or None where there is nothing to tell."""
        scored: tuple[ScoredToken, ...] | None = None
        if self._track is not None:
            self._num_taken += len(self._text)
            scored = self._track.take(self._num_taken, self.is_finished)
        if not (self._text or self._ids or scored) and self.finish_reason is None:
            return None
        ids = self._ids if self._has_ids else None
        delta = Delta(self.index, self._text, ids, self.finish_reason, self.stop_reason, scored)
        self._text, self._ids = "", ()
        return delta

    def _text_ids(self, output: RequestOutput) -> tuple[int, ...]:
        """The new ids that are text: the token that stopped a choice is counted, but not shown unless asked for."""
        is_shown = output.stop_token_id is None or self._shape.include_stop
        return output.new_token_ids if is_shown else output.new_token_ids[:-1]
