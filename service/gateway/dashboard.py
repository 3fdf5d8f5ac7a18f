"""`/dashboard/data`: what the page at `/dashboard` draws, from this server's own memory of the last minutes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.engine.inspection import FIRST_OWNER, IDLE, Inspection
from service.gateway.gateway import Gateway, gateway_of
from service.gateway.history import NUM_SAMPLES, PERIOD_S, PHASES, replica_rows
from service.gateway.query import number_in_query
from service.gateway.responses import json_response
from service.gateway.survey import survey

logger = logging.getLogger(__name__)
router = APIRouter()

# More tiles than this cannot be told apart on a screen.
MAX_TILES = 1024


@router.get("/dashboard/data", response_model=None, include_in_schema=False)
async def data(request: Request) -> Response:
    """The samples numbered above `?after=`, and every replica as it is now."""
    after = int(number_in_query(request, "after", 0, low=0, high=2**53))
    gateway = gateway_of(request)
    found, inspections = await asyncio.gather(survey(gateway), _inspections(gateway))
    tiles = {inspection.replica: tiles_of(inspection.blocks) for inspection in inspections}
    replicas = [row | {"tiles": tiles.get(str(row["name"]), "")} for row in replica_rows(found.replicas or ())]
    served = gateway.served
    body = {
        "model": served.name,
        "version": gateway.version,
        "kernel": served.info.kernel_path,
        "device": served.info.device,
        "dtype": served.info.dtype,
        "is_draining": gateway.drain.is_draining,
        "is_up": found.replicas is not None,
        "gateways": len(found.gateways),
        "period_s": PERIOD_S,
        "num_samples": NUM_SAMPLES,
        "phases": PHASES,
        "samples": gateway.history.since(after),
        "replicas": replicas,
    }
    return json_response(body)


async def _inspections(gateway: Gateway) -> Sequence[Inspection]:
    try:
        async with asyncio.timeout(gateway.settings.stats_timeout_s):
            return await gateway.engine.inspect()
    except Exception as error:
        logger.warning("the engine could not be looked into: %r", error)
        return ()


def tiles_of(blocks: bytes) -> str:
    """A character for each block, or for so many neighbours that at most `MAX_TILES` remain: "." free, "-" idle, "="
    shared, else a letter that stands for the request that holds it.
    """
    size = -(-len(blocks) // MAX_TILES) or 1
    return "".join(_tile(blocks[first : first + size]) for first in range(0, len(blocks), size))


def _tile(blocks: bytes) -> str:
    top = max(blocks)
    if top >= FIRST_OWNER:
        return chr(ord("a") + (top - FIRST_OWNER) % 26)
    return ".-="[top] if top > IDLE or IDLE in blocks else "."
