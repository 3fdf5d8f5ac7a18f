"""What an engine calls when a traced request ends. Imports a tracing library only where there is an endpoint."""

from __future__ import annotations

from collections.abc import Callable

from service.engine.request import Request, RequestOutput


def tracing_to(endpoint: str | None, replica: str) -> Callable[[Request, RequestOutput], None] | None:
    """What sends the spans of a replica's requests to the collector at `endpoint`; None without one."""
    if endpoint is None:
        return None
    from service.tracing import EngineTracer, make_provider

    return EngineTracer(make_provider(endpoint, "engine", replica), replica).ended
