"""Lets only those in who have a key: a layer before every route but a few."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.gateway.api_keys import KeyRing
from service.gateway.errors import ApiError
from service.gateway.exchange import exchange_of
from service.gateway.responses import error_response

# What a load balancer asks, and the pages, which have nothing to hide: they ask their user for a key.
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/", "", "/dashboard"})
OPEN_PREFIX = "/static/"
METRICS_PATH = "/metrics"
ADMIN_PATHS = frozenset({METRICS_PATH, "/dashboard/data", "/debug/requests", "/debug/timeline"})


def is_open(path: str, *, has_public_metrics: bool) -> bool:
    """Whether a path, below the root path, needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX) or (has_public_metrics and path == METRICS_PATH)


class Authenticator:
    """ASGI middleware, to be put inside of `Observer`."""

    def __init__(self, app: ASGIApp, keys: KeyRing, *, has_public_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._has_public_metrics = has_public_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path = _route_path(scope)
        if is_open(path, has_public_metrics=self._has_public_metrics):
            return
        exchange = exchange_of(scope)
        key = self._keys.find(_secret(scope))
        if key is None:
            raise _unauthorized("the API key is not known here")
        exchange.key = key
        exchange.fields["key"] = key.id
        if path in ADMIN_PATHS and not key.admin:
            raise ApiError(403, "this needs an API key with 'admin'", code="not_admin")


def _route_path(scope: Scope) -> str:
    """The path below the root path, as routing itself sees it, whether a proxy has stripped the root path or not."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if path == root or path.startswith(f"{root}/") else path


def _secret(scope: Scope) -> bytes:
    given = Headers(scope=scope).getlist("authorization")
    if not given:
        raise _unauthorized("an API key is needed: send 'Authorization: Bearer <key>'")
    scheme, _, secret = given[0].strip().partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer" or not secret.strip():
        raise _unauthorized("the Authorization header must be 'Bearer <key>'")
    return secret.strip().encode("latin-1")


def _unauthorized(message: str) -> ApiError:
    headers = {"WWW-Authenticate": 'Bearer realm="tessera"'}
    return ApiError(401, message, code="invalid_api_key", headers=headers)
