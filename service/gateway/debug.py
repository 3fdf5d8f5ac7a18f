"""`/debug/`: what an engineer asks when numbers are not enough. Who runs and waits, and what the latest steps did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from itertools import islice

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from service.engine.inspection import Inspection
from service.gateway.errors import ApiError
from service.gateway.exchange import exchange_of
from service.gateway.gateway import gateway_of
from service.gateway.query import number_in_query
from service.gateway.responses import json_response
from service.gateway.timeline import Event, trace_events

router = APIRouter()

MAX_SECONDS = 600.0
_EVENTS_AT_A_TIME = 500


@router.get("/debug/requests", response_model=None, include_in_schema=False)
async def requests(request: Request) -> Response:
    """Every request that runs or waits, replica by replica, with the time it has spent in each phase."""
    inspections = await _inspect(request, 0.0)
    replicas = [
        {"replica": inspection.replica, "requests": [asdict(state) for state in inspection.requests]}
        for inspection in inspections
    ]
    return json_response({"replicas": replicas})


@router.get("/debug/timeline", response_model=None, include_in_schema=False)
async def timeline(request: Request) -> Response:
    """The engine's steps and ended requests of the last `?seconds=`, as Chrome trace events for Perfetto.

    An engine remembers its last few thousand steps: of a longer time than those took, the end is told.
    """
    seconds = number_in_query(request, "seconds", 10.0, low=0.001, high=MAX_SECONDS)
    inspections = await _inspect(request, seconds)
    headers = {"content-disposition": 'attachment; filename="timeline.json"'}
    return StreamingResponse(_in_parts(trace_events(inspections)), headers=headers, media_type="application/json")


async def _in_parts(events: Iterator[Event]) -> AsyncIterator[bytes]:
    """A trace as JSON. There may be a hundred thousand events, and others wait for this event loop: a few at a time."""
    separator = b'{"displayTimeUnit":"ms","traceEvents":['
    while part := list(islice(events, _EVENTS_AT_A_TIME)):
        yield separator + orjson.dumps(part)[1:-1]
        separator = b","
        await asyncio.sleep(0)
    yield b"]}" if separator == b"," else separator + b"]}"


async def _inspect(request: Request, seconds: float) -> Sequence[Inspection]:
    gateway = gateway_of(request)
    # Where there are keys, nobody gets here without an admin's.
    if exchange_of(request.scope).key is None and not gateway.settings.has_debug:
        raise ApiError(404, "there is nothing at this path", code="not_found")
    try:
        async with asyncio.timeout(gateway.settings.stats_timeout_s):
            return await gateway.engine.inspect(seconds)
    except TimeoutError as error:
        raise ApiError(503, "the engine did not answer in time", code="engine_silent") from error
