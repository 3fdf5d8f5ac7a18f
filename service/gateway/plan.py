"""From a completion request to what the engine is asked: every default filled in, every limit checked."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.engine.request import Request
from service.gateway.bounds import check_bounds, check_told
from service.gateway.errors import ApiError, BadRequestError
from service.gateway.grammar_fields import AskedGrammar, asked_grammar
from service.gateway.prompts import Room, TokenIds, require_tokenizer, resolve_prompts
from service.gateway.sampling import sampling_params
from service.gateway.schema import CompletionRequest
from service.gateway.served_model import ServedModel
from service.gateway.settings import GatewaySettings
from service.gateway.shape import PLAIN, AnswerShape
from service.gateway.stops import StopSet

DEFAULT_MAX_TOKENS = 16

# Seeds we draw ourselves stay exact in a JavaScript number, so that a browser can send them back.
_MAX_DRAWN_SEED = 2**53
_RANDOM_SEED = -1


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """One accepted request. `requests` are its choices in the order of their indices; `created` is a Unix time.

    Each run of `num_choices` of them continues one prompt. `asked_grammar` is in their parameters, and still to be
    checked.
    """

    request_id: str
    created: int
    model: str
    requests: tuple[Request, ...]
    num_choices: int
    num_prompt_tokens: int
    seed: int
    stops: StopSet | None = None
    shape: AnswerShape = PLAIN
    is_stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    asked_grammar: AskedGrammar | None = None


async def make_plan(
    params: CompletionRequest, served: ServedModel, settings: GatewaySettings, request_id: str, arrived_s: float
) -> CompletionPlan:
    """Raises ApiError for what this server cannot do. `arrived_s` is on the clock of `time.perf_counter`."""
    model = resolve_model(params.model, served)
    check_bounds(params, served, settings)
    asked = asked_grammar(params, settings)
    if asked is not None:
        require_tokenizer(served, asked.param)
    prompts = await resolve_prompts(params.prompt, served, settings, _room(params, served.info.max_model_len))
    # More than the engine holds could never be accepted, however often the client came back.
    max_choices = min(settings.max_choices, served.info.max_num_requests)
    if params.n * len(prompts) > max_choices:
        message = f"'n' times the number of prompts must be at most {max_choices}"
        raise BadRequestError(message, param="n" if params.n > 1 else "prompt")
    seed = secrets.randbelow(_MAX_DRAWN_SEED) if params.seed in (None, _RANDOM_SEED) else params.seed
    assert seed is not None
    options = params.stream_options
    requests = await _engine_requests(params, prompts, seed, served, settings, request_id, arrived_s)
    return CompletionPlan(
        request_id=request_id,
        created=int(time.time()),
        model=model,
        requests=requests if asked is None else _held_to(asked, requests),
        num_choices=params.n,
        num_prompt_tokens=sum(map(len, prompts)),
        seed=seed,
        stops=StopSet(params.stop) if params.stop else None,
        shape=_shape(params),
        is_stream=params.stream,
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        asked_grammar=asked,
    )


def _held_to(asked: AskedGrammar, requests: Sequence[Request]) -> tuple[Request, ...]:
    return tuple(replace(r, sampling=replace(r.sampling, grammar=asked.grammar)) for r in requests)


def _shape(params: CompletionRequest) -> AnswerShape:
    return AnswerShape(
        echo=params.echo,
        num_logprobs=params.logprobs,
        num_prompt_logprobs=params.prompt_logprobs,
        has_token_ids=params.return_token_ids,
        tokens_as_ids=params.return_tokens_as_token_ids,
        skip_special=params.skip_special_tokens,
        include_stop=params.include_stop_str_in_output,
    )


def resolve_model(name: str | None, served: ServedModel) -> str:
    """The name to answer with. Raises ApiError 404 where it is not served."""
    if name is None:
        return served.name
    if name not in served.names:
        message = "the model does not exist; GET /v1/models lists what is served"
        raise ApiError(404, message, code="model_not_found", param="model")
    return name


def _room(params: CompletionRequest, max_model_len: int) -> Room:
    room = max_model_len - (params.max_tokens != 0)
    keep = params.truncate_prompt_tokens
    if keep == -1:
        keep = max(max_model_len - (DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens), 1)
    return Room(room, keep, params.truncation_side)


async def _engine_requests(
    params: CompletionRequest,
    prompts: Sequence[TokenIds],
    seed: int,
    served: ServedModel,
    settings: GatewaySettings,
    request_id: str,
    arrived_s: float,
) -> tuple[Request, ...]:
    # Clients may send the same request id twice; the engine must not see it twice.
    unique = f"{request_id}:{secrets.token_hex(4)}"
    common = await sampling_params(params, seed, served.tokenizer, settings)
    lengths = [_max_tokens(params, len(prompt), served.info.max_model_len) for prompt in prompts]
    check_told(params, prompts, lengths, settings)
    timeout_s = None if params.timeout is None else max(params.timeout - (time.perf_counter() - arrived_s), 0.0)
    requests: list[Request] = []
    for prompt, max_tokens in zip(prompts, lengths, strict=True):
        for choice in range(params.n):
            requests.append(
                Request(
                    f"{unique}:{len(requests)}",
                    prompt,
                    replace(common, max_tokens=max_tokens, choice_index=choice),
                    priority=params.priority,
                    cache_salt=params.cache_salt or "",
                    timeout_s=timeout_s,
                )
            )
    return tuple(requests)


def _max_tokens(params: CompletionRequest, prompt_len: int, max_model_len: int) -> int:
    """Most tokens of a choice of this prompt, which together with it fit the model."""
    max_tokens = min(DEFAULT_MAX_TOKENS, max_model_len - prompt_len) if params.max_tokens is None else params.max_tokens
    if prompt_len + max_tokens > max_model_len:
        message = (
            f"'max_tokens' ({max_tokens}) and a prompt of {prompt_len} tokens make "
            f"{prompt_len + max_tokens}; prompt and completion together may have {max_model_len} tokens"
        )
        raise BadRequestError(message, param="max_tokens", code="context_length_exceeded")
    if params.min_tokens > max_tokens:
        message = f"'min_tokens' must be at most 'max_tokens' ({max_tokens}), got {params.min_tokens}"
        raise BadRequestError(message, param="min_tokens")
    return max_tokens
