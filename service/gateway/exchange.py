"""What is known of one HTTP exchange while it lasts: its id, when it began, what to log of it."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.types import Scope, Send

from service.gateway.api_keys import ApiKey
from service.gateway.schema import REQUEST_ID
from service.logs import current_request_id

_SANE_ID = re.compile(REQUEST_ID)
_KEY = "exchange"


@dataclass(slots=True)
class Exchange:
    """`started_s` is on the clock of `time.perf_counter`; `fields` are the extra words of the log line.

    `key` is who asks, where keys are asked for; `headers` go out with the answer, whatever it is. `trace_context` is
    a W3C `traceparent`, empty where nobody traces. `send` is the server's own, for what comes after an answer's head.
    """

    request_id: str
    started_s: float
    status: int | None = None
    fields: dict[str, object] = field(default_factory=dict)
    key: ApiKey | None = None
    headers: dict[str, str] = field(default_factory=dict)
    trace_context: str = ""
    send: Send | None = None

    def rename(self, request_id: object) -> None:
        """Goes on under the id that a body gave, if that is sane."""
        self.request_id = _sane(request_id) or self.request_id
        current_request_id.set(self.request_id)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s


def open_exchange(scope: Scope) -> Exchange:
    """Begins the exchange of an HTTP `scope` under the id its client gave, if that is sane, or a new one."""
    exchange = Exchange(_given_id(scope) or _new_id(scope["path"]), time.perf_counter())
    current_request_id.set(exchange.request_id)
    scope.setdefault("state", {})[_KEY] = exchange
    return exchange


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that `open_exchange` began for this scope."""
    exchange = scope["state"][_KEY]
    assert isinstance(exchange, Exchange)
    return exchange


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id":
            return _sane(str(value, "latin-1"))
    return None


def _sane(value: object) -> str | None:
    return value if isinstance(value, str) and _SANE_ID.fullmatch(value) else None


def _new_id(path: str) -> str:
    kind = "cmpl" if path.endswith("/completions") else "req"
    return f"{kind}-{secrets.token_hex(16)}"
