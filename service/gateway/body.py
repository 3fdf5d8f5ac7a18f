"""Reading a JSON object from a request, within limits of size and time."""

from __future__ import annotations

import asyncio
from email.message import Message

import orjson
from starlette.requests import Request

from service.gateway.errors import MAX_NAME_CHARS, ApiError, BadRequestError, shorten
from service.gateway.settings import GatewaySettings
from service.repeated_keys import repeated_key

_PATIENCE = 4


async def read_json_object(request: Request, settings: GatewaySettings) -> dict[str, object]:
    """The object in the body. Raises ApiError: 400, 408, 413 or 415."""
    _require_json(request)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            raw = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_timeout_s:g} s"
        raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
    return _parse_object(raw)


def _require_json(request: Request) -> None:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind = header.get_content_type() if request.headers.get("content-type") else ""
    if kind != "application/json":
        raise _unsupported("the Content-Type must be application/json")
    if str(header.get_param("charset", "utf-8")).lower() not in ("utf-8", "utf8"):
        raise _unsupported("the body must be encoded as UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _unsupported("compressed bodies are not supported")


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


async def _read(request: Request, limit: int) -> bytes:
    """Throws away a body that is larger by a little: cut off while it sends, a client would not get to read why."""
    length, bearable = request.headers.get("content-length", "0"), _PATIENCE * limit
    if length.isdecimal() and int(length[:20]) > bearable:
        raise _too_large(limit)
    raw, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size > bearable:
            raise _too_large(limit)
        if size <= limit:
            raw += piece
    if size > limit:
        raise _too_large(limit)
    return bytes(raw)


def _too_large(limit: int) -> ApiError:
    # Closing spares both sides the rest of the body.
    headers = {"Connection": "close"}
    return ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large", headers=headers)


def _parse_object(raw: bytes) -> dict[str, object]:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        message = f"the body is not valid JSON: {_not_utf8(raw) or where}"
        raise BadRequestError(message, param=None, code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequestError("the body must be a JSON object", param=None, code="invalid_json")
    _refuse_repeated_keys(raw, value)
    return value


def _refuse_repeated_keys(raw: bytes, value: dict[str, object]) -> None:
    try:
        key = repeated_key(raw, value)
    except RecursionError:
        raise BadRequestError("the body is nested too deeply", param=None, code="invalid_json") from None
    if key is not None:
        name = shorten(key, MAX_NAME_CHARS)
        raise BadRequestError(f"'{name}' is there more than once", param=name, code="repeated_parameter")


def _not_utf8(raw: bytes) -> str | None:
    """Where the bytes are no text; the JSON reader does not tell."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} is not valid UTF-8"
    return None
