"""What a completion request may ask of this server: counts, sizes, token ids, and what goes together."""

from __future__ import annotations

from collections.abc import Sequence

from service.gateway.errors import BadRequestError, shorten
from service.gateway.prompts import TokenIds, check_token_ids, require_tokenizer
from service.gateway.schema import CompletionRequest
from service.gateway.served_model import ServedModel
from service.gateway.settings import GatewaySettings


def check_bounds(params: CompletionRequest, served: ServedModel, settings: GatewaySettings) -> None:
    """Raises BadRequestError naming the parameter and its bound."""
    _at_most(params.n, settings.max_n, "n")
    _at_most(len(params.user or ""), settings.max_user_chars, "user", "characters")
    _at_most(len(params.cache_salt or ""), settings.max_cache_salt_chars, "cache_salt", "characters")
    _at_most(params.timeout or 0, settings.max_timeout_s, "timeout")
    if params.truncate_prompt_tokens == 0:
        raise BadRequestError(
            "'truncate_prompt_tokens' must be -1 or at least 1, got 0", param="truncate_prompt_tokens"
        )
    _check_logprobs(params, settings)
    _check_together(params, served)
    _check_words(params, served, settings)
    _check_ids(params, served, settings)


def check_told(
    params: CompletionRequest, prompts: Sequence[TokenIds], max_tokens: Sequence[int], settings: GatewaySettings
) -> None:
    """Raises BadRequestError where the log probabilities of the whole answer would be too many to hold at once."""
    each = 0 if params.logprobs is None else 1 + max(params.logprobs, len(params.logprob_token_ids))
    of_prompt = (each if params.echo else 0) + (0 if params.prompt_logprobs is None else 1 + params.prompt_logprobs)
    # A stream hands them on as they come, except those of the prompt, which come together.
    of_completion = 0 if params.stream else each
    told = sum(map(len, prompts)) * of_prompt + sum(max_tokens) * of_completion
    if told * params.n > settings.max_told_logprobs:
        name = "prompt_logprobs" if params.logprobs is None else "logprobs"
        message = (
            f"the answer would have {told * params.n} log probabilities; '{name}', tokens "
            f"and choices must come to at most {settings.max_told_logprobs}"
        )
        raise BadRequestError(message, param=name)


def _check_logprobs(params: CompletionRequest, settings: GatewaySettings) -> None:
    _at_most(params.logprobs or 0, settings.max_logprobs, "logprobs")
    _at_most(params.prompt_logprobs or 0, settings.max_logprobs, "prompt_logprobs")
    _at_most(len(params.logprob_token_ids), settings.max_logprob_token_ids, "logprob_token_ids", "token ids")
    if params.logprob_token_ids and params.logprobs is None:
        raise BadRequestError("'logprob_token_ids' needs 'logprobs'", param="logprob_token_ids")
    if params.logprob_token_ids and params.max_tokens == 0:
        message = "'logprob_token_ids' needs 'max_tokens' of at least 1: it tells of generated tokens"
        raise BadRequestError(message, param="logprob_token_ids")


def _check_together(params: CompletionRequest, served: ServedModel) -> None:
    if params.max_tokens == 0 and not params.echo:
        raise BadRequestError("'max_tokens' must be at least 1, got 0; with 'echo' it may be 0", param="max_tokens")
    if params.prompt_logprobs is not None and params.stream:
        message = "'prompt_logprobs' cannot be streamed; 'echo' with 'logprobs' can"
        raise BadRequestError(message, param="prompt_logprobs")
    if params.echo and params.logprobs is None:
        require_tokenizer(served, "echo")


def _check_words(params: CompletionRequest, served: ServedModel, settings: GatewaySettings) -> None:
    _at_most(len(params.stop), settings.max_stops, "stop", "strings")
    for i, stop in enumerate(params.stop):
        _at_most(len(stop), settings.max_stop_chars, f"stop[{i}]", "characters")
    _at_most(len(params.bad_words), settings.max_bad_words, "bad_words", "words")
    for i, word in enumerate(params.bad_words):
        _at_most(len(word.encode(errors="replace")), settings.max_bad_word_bytes, f"bad_words[{i}]", "bytes")
    if params.stop:
        require_tokenizer(served, "stop")
    if params.bad_words:
        require_tokenizer(served, "bad_words")


def _check_ids(params: CompletionRequest, served: ServedModel, settings: GatewaySettings) -> None:
    _at_most(len(params.stop_token_ids), settings.max_stop_token_ids, "stop_token_ids", "token ids")
    check_token_ids(params.stop_token_ids, "stop_token_ids", served.info.vocab_size)
    allowed = params.allowed_token_ids or ()
    _at_most(len(allowed), settings.max_allowed_token_ids, "allowed_token_ids", "token ids")
    check_token_ids(allowed, "allowed_token_ids", served.num_written_ids)
    check_token_ids(params.logprob_token_ids, "logprob_token_ids", served.num_written_ids)
    _at_most(len(params.logit_bias), settings.max_logit_bias, "logit_bias", "token ids")
    for key in params.logit_bias:
        _check_key(key, served.num_written_ids)


def _check_key(key: str, num_ids: int) -> None:
    is_id = key.isascii() and key.isdecimal() and len(key) < 20 and key == str(int(key)) and int(key) < num_ids
    if not is_id:
        message = f"'logit_bias' must have token ids, 0 to {num_ids - 1}, as its keys; '{shorten(key, 20)}' is none"
        raise BadRequestError(message, param="logit_bias")


def _at_most(value: float, limit: float, param: str, unit: str = "") -> None:
    if value > limit:
        bound = f"must have at most {limit} {unit}" if unit else f"must be at most {limit}"
        raise BadRequestError(f"'{param}' {bound}, got {value}", param=param)
