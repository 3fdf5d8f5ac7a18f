"""Which of a client's requests belong together: those of one session go to one engine, where its memory is."""

from __future__ import annotations

from starlette.datastructures import Headers

from service.gateway.errors import BadRequestError
from service.gateway.schema import CompletionRequest

SESSION_HEADER = "X-Session-Id"


def session_of(headers: Headers, params: CompletionRequest, max_chars: int) -> str:
    """The header's, else the `user` of the body, else none. Raises BadRequestError for a header that is too long."""
    given = headers.get(SESSION_HEADER)
    if given is None:
        return params.user or ""
    if len(given) > max_chars:
        message = f"'{SESSION_HEADER}' must be at most {max_chars} characters, got {len(given)}"
        raise BadRequestError(message, param=SESSION_HEADER)
    return given
