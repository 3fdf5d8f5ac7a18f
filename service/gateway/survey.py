"""Asking all parts of the service what they measured: this gateway, its peers, every engine replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric

from service.engine.stats import EngineStats
from service.gateway.gateway import Gateway

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Survey:
    """What each gateway measured, and each replica; `replicas` is None where the engine did not answer."""

    gateways: list[Sequence[Metric]]
    replicas: Sequence[EngineStats] | None


async def survey(gateway: Gateway, *, max_age_s: float = 0.0) -> Survey:
    """Asks everybody at once. Who is silent is left out: an answer must not fail with a part of the service.

    What replicas said at most `max_age_s` ago will do.
    """
    replicas, peers = await asyncio.gather(_replicas(gateway, max_age_s), _peers(gateway))
    # Last, so that it counts all that has happened while the others were asked.
    return Survey([gateway.metrics.families(), *peers], replicas)


async def _replicas(gateway: Gateway, max_age_s: float) -> Sequence[EngineStats] | None:
    try:
        async with asyncio.timeout(gateway.settings.stats_timeout_s):
            return await gateway.engine.stats(max_age_s=max_age_s)
    except Exception as error:
        logger.warning("the engine's statistics could not be asked: %r", error)
        return None


async def _peers(gateway: Gateway) -> Sequence[Sequence[Metric]]:
    try:
        async with asyncio.timeout(gateway.settings.stats_timeout_s):
            return await gateway.peers.families()
    except Exception as error:
        logger.warning("the other gateways could not be asked: %r", error)
        return ()
