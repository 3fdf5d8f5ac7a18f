"""By which names clients may call this server: else a page whose name is made to lead here reads what it answers."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from service.gateway.errors import ApiError
from service.gateway.responses import error_response

ANY = "*"


class HostGuard:
    """ASGI middleware, to be put inside of `Observer`. Refuses requests whose Host header is not among `names`.

    Addresses and localhost are always good: no page of another site has them as its name. A name "*.a.example" is good
    for all below a.example, "*" for all there are. A browser always sends the header, so it may be missing.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        names = [_plain(name) for name in names]
        self._names = frozenset(names)
        self._endings = tuple(name[1:] for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if not all(map(self._knows, hosts)):
                message = "this server is not called so: --allowed-hosts lists the names in Host headers that it takes"
                await error_response(ApiError(403, message, code="host_not_allowed"))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        name = host_name(host)
        if ANY in self._names or name in self._names or name.endswith(self._endings):
            return True
        return name == "localhost" or name.endswith(".localhost") or _is_address(name)


def host_name(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return _plain(name)


def _plain(name: str) -> str:
    return name.strip().lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
