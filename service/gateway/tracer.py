"""The port through which a gateway tells of its exchanges as spans. Knows no tracing library: few servers have one."""

from __future__ import annotations

from typing import Protocol

from starlette.types import Scope

from service.gateway.exchange import Exchange


class ExchangeTracer(Protocol):
    """Follows the exchanges that are worth a span."""

    def begin(self, scope: Scope, exchange: Exchange) -> None:
        """An exchange has begun. May set `exchange.trace_context`, which then goes to the engine."""
        ...

    def end(self, exchange: Exchange, status: int) -> None:
        """It is over; `exchange.fields` say what it was."""
        ...
