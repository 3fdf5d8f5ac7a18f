"""The one error shape that clients see, and the one table from exceptions to statuses."""

from __future__ import annotations

import http
import math
from collections.abc import Mapping

from starlette.exceptions import HTTPException

from service.engine.errors import (
    EngineDeadError,
    EngineOverloadedError,
    FatalRequestError,
    KeyOverloadedError,
    RequestRejectedError,
)

MAX_MESSAGE_CHARS = 500
MAX_NAME_CHARS = 64

_ENGINE_ERRORS: Mapping[type[Exception], tuple[int, str]] = {
    RequestRejectedError: (400, "request_rejected"),
    KeyOverloadedError: (429, "queue_share_exceeded"),
    EngineOverloadedError: (503, "overloaded"),
    EngineDeadError: (503, "engine_dead"),
    FatalRequestError: (500, "fatal_request"),
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A failure as a client sees it. The message is safe to send: it names no internal."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shorten(message, MAX_MESSAGE_CHARS)
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, object]:
        """The answer's JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class BadRequestError(ApiError):
    """The request cannot be served as it is; `param` says which part of it is the reason."""

    def __init__(self, message: str, *, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(400, message, code=code, param=param)


class GenerationFailedError(ApiError):
    """The engine gave up on a request it had accepted."""

    def __init__(self) -> None:
        super().__init__(500, "the generation failed on the server", code="engine_error")


class DrainingError(ApiError):
    """The server is going away: it finishes what it has and takes nothing new."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(
            503, "the server is shutting down", code="draining", headers={"Retry-After": retry_after(retry_after_s)}
        )


def to_api_error(error: Exception) -> ApiError:
    """What a client is told about `error`. Anything unforeseen becomes a 500 that says nothing of its cause."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return _from_http(error)
    for kind, (status, code) in _ENGINE_ERRORS.items():
        if isinstance(error, kind):
            headers = {}
            if isinstance(error, EngineOverloadedError):
                headers["Retry-After"] = retry_after(error.retry_after_s)
            elif isinstance(error, FatalRequestError):
                # The official clients send anything from 500 on again, unless they are told not to.
                headers["X-Should-Retry"] = "false"
            return ApiError(status, str(error), code=code, headers=headers)
    return ApiError(500, "the server met an internal error", code="internal_error")


def retry_after(seconds: float) -> str:
    """Whole seconds, rounded up, at least one, at most an hour."""
    return str(math.ceil(min(max(seconds, 1.0), 3600.0)))


def shorten(text: str, limit: int) -> str:
    """`text` cut to `limit` characters, marked where it was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _from_http(error: HTTPException) -> ApiError:
    phrase = http.HTTPStatus(error.status_code).phrase
    messages = {404: "there is nothing at this path", 405: "this path does not answer to this method"}
    message = messages.get(error.status_code, error.detail)
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    return ApiError(error.status_code, message, code=code, headers=error.headers)
