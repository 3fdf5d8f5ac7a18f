"""JSON answers."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from service.gateway.errors import ApiError


def json_response(
    content: BaseModel | Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer with `content` as JSON."""
    body = content.model_dump() if isinstance(content, BaseModel) else content
    return Response(orjson.dumps(body), status, headers=headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """The answer to a request that failed."""
    return json_response(error.body(), error.status, error.headers)
