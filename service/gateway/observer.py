"""The outermost layer: gives every exchange an id, a log line, its metrics, and an answer even when code fails."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.gateway.errors import to_api_error
from service.gateway.exchange import Exchange, open_exchange
from service.gateway.responses import error_response
from service.gateway.tracer import ExchangeTracer
from service.metrics import GatewayMetrics

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("tessera.access")
slow_logger = logging.getLogger("tessera.slow")

CLIENT_CLOSED_REQUEST = 499  # As nginx has it: the client went away before there was an answer.

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_QUIET_ROUTES = frozenset({"/health", "/livez", "/readyz", "/metrics", "/dashboard/data"})
_PLAIN_WORD = re.compile(r"[A-Za-z0-9._:/,+-]+")


class Observer:
    """ASGI middleware. Never logs a query string, a header or a body. `client` is "local" behind a Unix socket."""

    def __init__(
        self, app: ASGIApp, metrics: GatewayMetrics, slow_request_s: float, tracer: ExchangeTracer | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._slow_request_s = slow_request_s
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = open_exchange(scope)
        exchange.send = send
        if self._tracer is not None:
            self._tracer.begin(scope, exchange)

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = _with_ours(message.get("headers", ()), exchange)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except ClientDisconnect:
            pass
        except Exception as error:
            logger.exception("request %s failed", exchange.request_id)
            if exchange.status is not None:
                raise  # Too late for an answer: the server cuts the connection.
            await error_response(to_api_error(error))(scope, receive, observed)
        finally:
            self._finish(scope, exchange)

    def _finish(self, scope: Scope, exchange: Exchange) -> None:
        status = exchange.status or CLIENT_CLOSED_REQUEST
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        if self._tracer is not None:
            self._tracer.end(exchange, status)
        self._metrics.http_finished(method, route, status, exchange.elapsed_s)
        level = logging.DEBUG if route in _QUIET_ROUTES and status < 500 else logging.INFO
        if access_logger.isEnabledFor(level):
            fields = _fields(scope, exchange, status)
            access_logger.log(level, "%s", _line(fields), extra={"fields": fields | {"route": route}})
        if exchange.elapsed_s >= self._slow_request_s:
            fields = _fields(scope, exchange, status)
            slow_logger.warning("slow: %s", _line(fields), extra={"fields": fields | {"route": route}})


def _with_ours(headers: Iterable[tuple[bytes, bytes]], exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """`headers` with those that every answer has. What says nothing of caches is for the one who asked alone."""
    headers = list(headers)
    extra = {"x-request-id": exchange.request_id, "x-content-type-options": "nosniff", **exchange.headers}
    if not any(name.lower() == b"cache-control" for name, _ in headers):
        extra["cache-control"] = "no-store"
    return [*headers, *((name.encode(), value.encode()) for name, value in extra.items())]


def _fields(scope: Scope, exchange: Exchange, status: int) -> dict[str, object]:
    return {
        "id": exchange.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(exchange.elapsed_s * 1000, 1),
        "client": scope["client"][0] if scope.get("client") else "local",
        **exchange.fields,
    }


def _line(fields: dict[str, object]) -> str:
    """`key=value` words; a value that a reader could mistake for more than one word is quoted as JSON."""
    return " ".join(f"{name}={_word(str(value))}" for name, value in fields.items())


def _word(value: str) -> str:
    return value if _PLAIN_WORD.fullmatch(value) else json.dumps(value)
