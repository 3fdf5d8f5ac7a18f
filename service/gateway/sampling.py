"""From a completion request to how its tokens are drawn."""

from __future__ import annotations

import asyncio

from model.tokenizer import Tokenizer
from service.engine.bad_words import BadWords
from service.engine.request import SamplingParams
from service.gateway.bad_words import forbid
from service.gateway.schema import CompletionRequest
from service.gateway.settings import GatewaySettings


async def sampling_params(
    params: CompletionRequest, seed: int, tokenizer: Tokenizer | None, settings: GatewaySettings
) -> SamplingParams:
    """What all choices have in common; `max_tokens` and `choice_index` are the caller's to set."""
    return SamplingParams(
        max_tokens=0,
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        typical_p=params.typical_p,
        min_p=params.min_p,
        seed=seed,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=tuple(params.stop_token_ids),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple((int(token_id), bias) for token_id, bias in params.logit_bias.items()),
        allowed_token_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
        bad_words=await _bad_words(params, tokenizer, settings),
        num_logprobs=params.logprobs,
        logprob_token_ids=tuple(dict.fromkeys(params.logprob_token_ids)),
        num_prompt_logprobs=_num_prompt_logprobs(params),
    )


def _num_prompt_logprobs(params: CompletionRequest) -> int | None:
    asked = [params.prompt_logprobs, params.logprobs if params.echo else None]
    return max((n for n in asked if n is not None), default=None)


async def _bad_words(
    params: CompletionRequest, tokenizer: Tokenizer | None, settings: GatewaySettings
) -> BadWords | None:
    if not params.bad_words or tokenizer is None:
        return None
    # Time goes with the square of a word's length.
    if sum(len(word) ** 2 for word in params.bad_words) < settings.threaded_chars:
        return forbid(params.bad_words, tokenizer)
    return await asyncio.to_thread(forbid, params.bad_words, tokenizer)
