"""What every route needs, in one place, and how a route finds it."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from service.gateway.client import EngineClient
from service.gateway.drain import Drain
from service.gateway.grammar_check import GrammarChecker
from service.gateway.history import History
from service.gateway.rate_limit import RateLimiter
from service.gateway.served_model import ServedModel
from service.gateway.settings import GatewaySettings
from service.gateway.survey import Surveyor
from service.metrics import GatewayMetrics


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway's parts. Lives as `app.state.gateway`."""

    engine: EngineClient
    served: ServedModel
    settings: GatewaySettings
    metrics: GatewayMetrics
    drain: Drain
    limiter: RateLimiter
    grammars: GrammarChecker
    surveyor: Surveyor
    history: History
    version: str


def gateway_of(request: Request) -> Gateway:
    """The gateway that answers `request`."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway
