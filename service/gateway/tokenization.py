"""`/tokenize` and `/detokenize`: the served model's own tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.gateway.answer_schema import DetokenizeResponse, TokenizeResponse
from service.gateway.body import read_json_object
from service.gateway.exchange import exchange_of
from service.gateway.gateway import gateway_of
from service.gateway.openapi import BODY_ERRORS, errors, json_body
from service.gateway.plan import resolve_model
from service.gateway.prompts import check_token_ids, encode_texts, require_tokenizer
from service.gateway.responses import json_response
from service.gateway.schema import DetokenizeRequest, TokenizeRequest
from service.gateway.validation import parse_detokenize, parse_tokenize

router = APIRouter()


@router.post(
    "/tokenize",
    response_model=None,
    openapi_extra=json_body(TokenizeRequest),
    responses={200: {"model": TokenizeResponse}, **errors(*BODY_ERRORS)},
)
async def tokenize(request: Request) -> Response:
    """Text to token ids."""
    gateway = gateway_of(request)
    _count_request(request)
    params = parse_tokenize(await read_json_object(request, gateway.settings))
    resolve_model(params.model, gateway.served)
    tokenizer = require_tokenizer(gateway.served, "prompt")
    [tokens] = await encode_texts([params.prompt], tokenizer, gateway.settings)
    limit = gateway.served.info.max_model_len
    return json_response(TokenizeResponse(count=len(tokens), max_model_len=limit, tokens=tokens))


@router.post(
    "/detokenize",
    response_model=None,
    openapi_extra=json_body(DetokenizeRequest),
    responses={200: {"model": DetokenizeResponse}, **errors(*BODY_ERRORS)},
)
async def detokenize(request: Request) -> Response:
    """Token ids to text, special tokens spelled out."""
    gateway = gateway_of(request)
    _count_request(request)
    params = parse_detokenize(await read_json_object(request, gateway.settings))
    resolve_model(params.model, gateway.served)
    tokenizer = require_tokenizer(gateway.served, "tokens")
    check_token_ids(params.tokens, "tokens", gateway.served.info.vocab_size)
    return json_response(DetokenizeResponse(prompt=tokenizer.decode(params.tokens, skip_special=False)))


def _count_request(request: Request) -> None:
    """Counts against the key's requests, not its tokens: the engine has nothing to do. Raises ApiError 429."""
    exchange = exchange_of(request.scope)
    exchange.headers |= gateway_of(request).limiter.reserve(exchange.key, 0).headers()
