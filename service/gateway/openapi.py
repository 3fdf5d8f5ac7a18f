"""Describing bodies and errors that FastAPI does not parse itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from service.gateway.answer_schema import ErrorResponse

_REASONS = {
    400: "Something in the request is wrong; `param` says what.",
    401: "An API key is needed.",
    403: "The API key may not do this.",
    404: "The model or path does not exist.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The API key is over its limit; `Retry-After` says when to come back.",
    500: "The server failed.",
    503: "The server is full, going away, or its engine is down.",
}
BODY_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500)


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model` from its body."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inline(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with these error statuses."""
    return {status: {"model": ErrorResponse, "description": _REASONS[status]} for status in statuses}


def describe_keys(app: FastAPI, is_open: Callable[[str], bool]) -> None:
    """Makes the document say that every path but those that are open wants a key."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["ApiKey"] = {"type": "http", "scheme": "bearer"}
        document["security"] = [{"ApiKey": []}]
        for path, operations in document["paths"].items():
            for operation in operations.values() if is_open(path) else ():
                operation["security"] = []
        return document

    app.openapi = described  # type: ignore[method-assign]


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        if "$ref" in node:
            return _inline(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
        return {key: _inline(value, definitions) for key, value in node.items()}
    return [_inline(item, definitions) for item in node] if isinstance(node, list) else node
