"""`/dashboard/data`: what the page at `/dashboard` draws, from this server's own memory of the last minutes."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.engine.block_holders import FIRST_OWNER, FREE, IDLE, SHARED
from service.gateway.gateway import gateway_of
from service.gateway.history import NUM_SAMPLES, PERIOD_S, PHASES, replica_rows
from service.gateway.query import number_in_query
from service.gateway.responses import json_response

router = APIRouter()

# More tiles than this cannot be told apart on a screen.
MAX_TILES = 1024
_OWNERLESS = bytes((FREE, IDLE, SHARED))


@router.get("/dashboard/data", response_model=None, include_in_schema=False)
async def data(request: Request) -> Response:
    """The samples numbered above `?after=`, and every replica as it is now."""
    after = int(number_in_query(request, "after", 0, low=0, high=2**53))
    gateway = gateway_of(request)
    found, inspections = await asyncio.gather(gateway.surveyor.survey(), gateway.surveyor.inspect())
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


def tiles_of(blocks: bytes) -> str:
    """A character for each block, or for so many neighbours that at most `MAX_TILES` remain: "." free, "-" idle, "="
    shared, else a letter that stands for the request that holds it.
    """
    size = -(-len(blocks) // MAX_TILES) or 1
    return "".join(_tile(blocks[first : first + size]) for first in range(0, len(blocks), size))


def _tile(blocks: bytes) -> str:
    if owners := blocks.translate(None, _OWNERLESS):
        return chr(ord("a") + (owners[0] - FIRST_OWNER) % 26)
    return "=" if SHARED in blocks else "-" if IDLE in blocks else "."
