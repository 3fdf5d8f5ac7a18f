"""A completion as JSON: the fields that all its parts have in common, and its choices, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable

from model.tokenizer import Tokenizer
from service.gateway.choice import Choice, Delta
from service.gateway.logprobs import TokenNames, legacy_logprobs, prompt_logprobs
from service.gateway.plan import CompletionPlan


class AnswerWriter:
    """Writes the answer to one plan. `fingerprint` is asked for with each part of it."""

    def __init__(self, plan: CompletionPlan, tokenizer: Tokenizer | None, fingerprint: Callable[[], str]) -> None:
        self._plan = plan
        self._shape = plan.shape
        self._fingerprint = fingerprint
        self._names = TokenNames(tokenizer, plan.shape.tokens_as_ids)

    def head(self) -> dict[str, object]:
        """The fields that all chunks of an answer and the whole answer have in common."""
        return {
            "id": self._plan.request_id,
            "object": "text_completion",
            "created": self._plan.created,
            "model": self._plan.model,
            "system_fingerprint": self._fingerprint(),
            "seed": self._plan.seed,
        }

    def piece(self, delta: Delta, *, is_first: bool) -> dict[str, object]:
        """What is new of a choice; `is_first` when nothing of it was written before."""
        body: dict[str, object] = {
            "index": delta.choice_index,
            "text": delta.text,
            "logprobs": None if delta.scored is None else legacy_logprobs(delta.scored, self._names),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if delta.token_ids is not None:
            body["token_ids"] = delta.token_ids
        if self._shape.has_token_ids and is_first:
            body["prompt_token_ids"] = self._plan.requests[delta.choice_index].prompt_token_ids
        return body

    def whole(self, delta: Delta, choice: Choice) -> dict[str, object]:
        """All of a choice."""
        body = self.piece(delta, is_first=True)
        if self._shape.num_prompt_logprobs is not None:
            scores = choice.prompt_logprobs
            num_top = self._shape.num_prompt_logprobs
            body["prompt_logprobs"] = None if scores is None else prompt_logprobs(scores, num_top, self._names)
        return body
