"""Log probabilities as clients get them: the legacy arrays for the tokens of a text, vLLM's tables for a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from model.tokenizer import Tokenizer
from service.engine.request import TokenLogprob

# JSON has no infinity: what vLLM and OpenAI write for the probability 0.
_LOWEST = -9999.0


class ScoredToken(NamedTuple):
    """A token of an answer. `offset` is where in the text, in characters, its first byte lies.

    `score` is None where there is nothing to condition on, or the deadline came first.
    """

    token_id: int
    score: TokenLogprob | None
    offset: int


class ScoreTrack:
    """The scored tokens of one choice, held back until it is certain where in the text they lie.

    A stop string cuts text that was on its way; tokens behind the cut then lie at the end of what is left.
    """

    def __init__(self) -> None:
        self._waiting: list[ScoredToken] = []

    def add(self, token_id: int, score: TokenLogprob | None, offset: int) -> None:
        """The next token. Offsets never fall."""
        self._waiting.append(ScoredToken(token_id, score, offset))

    def take(self, num_chars: int, is_final: bool) -> tuple[ScoredToken, ...]:
        """The tokens that are certain now that `num_chars` of the text are; the last ones when that is all of it."""
        ready = [token for token in self._waiting if token.offset <= num_chars]
        late = self._waiting[len(ready) :]
        self._waiting = [] if is_final else late
        return (*ready, *(token._replace(offset=num_chars) for token in late)) if is_final else tuple(ready)


def limited(score: TokenLogprob, num_top: int) -> TokenLogprob:
    """`score` with so many of its alternatives."""
    return replace(score, top=score.top[:num_top])


class TokenNames:
    """How tokens are written: their text, where they are no text by themselves their bytes, or their ids.

    Bytes are written as OpenAI does, `bytes:\\xe2\\x80`, so that no two tokens look alike.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False) -> None:
        self._tokenizer = None if as_ids else tokenizer

    def __getitem__(self, token_id: int) -> str:
        text = self._tokenizer.token_bytes(token_id, skip_special=False) if self._tokenizer else b""
        if not text:
            return f"token_id:{token_id}"
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def legacy_logprobs(tokens: Iterable[ScoredToken], names: TokenNames) -> dict[str, list[object]]:
    """The `logprobs` of a choice: one entry a token in each of four arrays."""
    body: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, score, offset in tokens:
        body["tokens"].append(names[token_id])
        body["token_logprobs"].append(None if score is None else _number(score.logprob))
        body["top_logprobs"].append(None if score is None else _top(score, names))
        body["text_offset"].append(offset)
    return body


def _top(score: TokenLogprob, names: TokenNames) -> dict[str, float]:
    """The likeliest tokens, or those that were asked for, in order, and the token itself."""
    top = {names[token_id]: _number(logprob) for token_id, logprob in score.top}
    return top | {names[score.token_id]: _number(score.logprob)}


def prompt_logprobs(
    scores: Sequence[TokenLogprob], num_top: int, names: TokenNames
) -> list[Mapping[str, Mapping[str, object]] | None]:
    """One table for each token of a prompt, by token id; the first token has none before it and no table."""
    return [None, *(_table(limited(score, num_top), names) for score in scores)]


def _table(score: TokenLogprob, names: TokenNames) -> dict[str, Mapping[str, object]]:
    ranked = [(score.token_id, score.logprob, score.rank)]
    ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(score.top, start=1)]
    return {
        str(token_id): {"logprob": _number(logprob), "rank": rank, "decoded_token": names[token_id]}
        for token_id, logprob, rank in ranked
    }


def _number(logprob: float) -> float:
    return max(logprob, _LOWEST)
