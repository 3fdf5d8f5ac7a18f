"""From the `prompt` field to lists of token ids that this model can continue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal, NamedTuple

from model.tokenizer import Tokenizer
from service.gateway.errors import BadRequestError
from service.gateway.served_model import ServedModel
from service.gateway.settings import GatewaySettings

TokenIds = tuple[int, ...]

_SHAPES = "must be a string, an array of strings, an array of token ids, or an array of arrays of token ids"
_EMPTY = "must not be empty: this model needs at least one token to continue; a space or a newline will do"


class Room(NamedTuple):
    """How many tokens a prompt may have, and what happens to one with more: cut to `keep` of them, or refused."""

    max_tokens: int
    keep: int | None = None
    side: Literal["left", "right"] = "left"

    def cut(self, item: Sequence[object]) -> range:
        """The indices of `item` that are kept."""
        if self.keep is None or len(item) <= self.keep:
            return range(len(item))
        return range(len(item) - self.keep, len(item)) if self.side == "left" else range(self.keep)


async def resolve_prompts(prompt: object, served: ServedModel, settings: GatewaySettings, room: Room) -> list[TokenIds]:
    """The token ids of each prompt. Raises BadRequestError naming `prompt` where one cannot be continued."""
    items = _as_items(prompt)
    if len(items) > settings.max_prompts:
        raise _invalid(f"holds {len(items)} prompts; the limit is {settings.max_prompts}")
    if all(isinstance(item, str) for item in items):
        texts = [str(item) for item in items]
        prompts = await _encode(texts, prompt, served, settings, room)
    else:
        prompts = [_check_ids(item, _name(prompt, i), served, room) for i, item in enumerate(items)]
    for i, token_ids in enumerate(prompts):
        if not token_ids:
            raise _invalid(_EMPTY, _name(prompt, i))
    return prompts


def require_tokenizer(served: ServedModel, param: str) -> Tokenizer:
    """The model's tokenizer. Raises BadRequestError naming `param` where it has none."""
    if served.tokenizer is None:
        message = f"'{param}' cannot be used here: this model has no tokenizer and is served for token ids only"
        raise BadRequestError(message, param=param, code="no_tokenizer")
    return served.tokenizer


async def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, settings: GatewaySettings) -> list[list[int]]:
    """The token ids of `texts`. Long texts are encoded in a thread, so that streams go on meanwhile."""
    if sum(map(len, texts)) < settings.threaded_chars:
        return [tokenizer.encode(text) for text in texts]
    return await asyncio.to_thread(lambda: [tokenizer.encode(text) for text in texts])


def check_token_ids(token_ids: Sequence[object], param: str, vocab_size: int, first_index: int = 0) -> None:
    """Raises BadRequestError naming the first of `token_ids` that is not in the vocabulary."""
    for i, token_id in enumerate(token_ids, first_index):
        if type(token_id) is not int:
            raise _invalid("must be a token id, an integer", f"{param}[{i}]")
        if not 0 <= token_id < vocab_size:
            raise _invalid(f"must be at least 0 and at most {vocab_size - 1}, got {token_id}", f"{param}[{i}]")


def _as_items(prompt: object) -> Sequence[object]:
    """One item for each prompt. What the items hold is checked later, except that they are of one kind."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise _invalid(_SHAPES)
    if not prompt:
        raise _invalid(_EMPTY)
    kind = type(prompt[0])
    if kind not in (str, int, list):
        raise _invalid(_SHAPES)
    for i, item in enumerate(prompt):
        if type(item) is not kind:
            raise _invalid(f"{_SHAPES}; 'prompt[{i}]' is not like 'prompt[0]'")
    return [prompt] if kind is int else prompt


async def _encode(
    texts: Sequence[str], prompt: object, served: ServedModel, settings: GatewaySettings, room: Room
) -> list[TokenIds]:
    tokenizer = require_tokenizer(served, "prompt")
    for i, text in enumerate(texts):
        # Refused unread: encoding what can never fit would cost the time of everybody else.
        at_least = -(-len(text.encode()) // served.longest_token)
        if at_least > room.max_tokens and room.keep is None:
            raise _too_long(f"at least {at_least}", served.info.max_model_len, room, _name(prompt, i))
    encoded = await encode_texts(texts, tokenizer, settings)
    kept = [_fit(ids, _name(prompt, i), served, room) for i, ids in enumerate(encoded)]
    return [tuple(ids[part.start : part.stop]) for ids, part in zip(encoded, kept, strict=True)]


def _check_ids(item: object, name: str, served: ServedModel, room: Room) -> TokenIds:
    assert isinstance(item, list)
    kept = _fit(item, name, served, room)
    ids = item[kept.start : kept.stop]
    check_token_ids(ids, name, served.info.vocab_size, kept.start)
    return tuple(ids)


def _fit(ids: Sequence[object], name: str, served: ServedModel, room: Room) -> range:
    """The indices of `ids` that are kept. Raises BadRequestError where they are too many."""
    kept = room.cut(ids)
    if len(kept) > room.max_tokens:
        raise _too_long(str(len(kept)), served.info.max_model_len, room, name)
    return kept


def _too_long(count: str, limit: int, room: Room, name: str) -> BadRequestError:
    reason = f", which leaves no room to generate: prompt and completion together may have {limit} tokens"
    if room.max_tokens == limit:
        reason = f"; it may have {limit}"
    return BadRequestError(f"'{name}' has {count} tokens{reason}", param=name, code="context_length_exceeded")


def _name(prompt: object, index: int) -> str:
    """How a client finds the prompt of that index in what it sent."""
    is_many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return f"prompt[{index}]" if is_many else "prompt"


def _invalid(what: str, name: str = "prompt") -> BadRequestError:
    return BadRequestError(f"'{name}' {what}", param=name)
