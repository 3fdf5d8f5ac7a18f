"""Asking all parts of the service what they measured: this gateway, its peers, every engine replica."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client.core import Metric

from service.engine.inspection import Inspection
from service.engine.stats import EngineStats, Fleet
from service.gateway.client import EngineClient
from service.gateway.outage import Outage
from service.gateway.peers import Peers
from service.metrics import GatewayMetrics

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Survey:
    """What each gateway measured, and each replica; `replicas` is None where the engine did not answer, and `fleet`
    where nobody knows.
    """

    gateways: list[Sequence[Metric]]
    replicas: Sequence[EngineStats] | None
    fleet: Fleet | None = None


class Surveyor:
    """Asks everybody at once. Who is silent for `timeout_s` is left out: an answer must not fail with a part of the
    service. The log is told once when that begins and once when it is over, however often is asked meanwhile.
    """

    def __init__(self, metrics: GatewayMetrics, engine: EngineClient, peers: Peers, timeout_s: float) -> None:
        self._metrics = metrics
        self._engine = engine
        self._peers = peers
        self._timeout_s = timeout_s
        self._outages = {name: Outage(name) for name in ("the engine's statistics", "the other gateways", "the engine")}

    async def survey(self, *, max_age_s: float = 0.0) -> Survey:
        """The whole service. What replicas said at most `max_age_s` ago will do."""
        replicas, peers = await asyncio.gather(
            self._ask("the engine's statistics", self._engine.stats(max_age_s=max_age_s)),
            self._ask("the other gateways", self._peers.families()),
        )
        # Last, so that it counts all that has happened while the others were asked.
        return Survey([self._metrics.families(), *(peers or ())], replicas, self._engine.fleet())

    async def inspect(self) -> Sequence[Inspection]:
        """A look into every replica, as it is now."""
        return await self._ask("the engine", self._engine.inspect()) or ()

    async def _ask(self, name: str, answer: Awaitable[T]) -> T | None:
        outage = self._outages[name]
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await answer
        except Exception as error:
            outage.goes_on(error)
            return None
        outage.is_over()
        return result
