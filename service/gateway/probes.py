"""What operators ask: is it alive, is it ready, is it well, which version, which numbers."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from service.engine.stats import EngineHealth
from service.gateway.answer_schema import HealthResponse, ProbeResponse, VersionResponse
from service.gateway.errors import ApiError
from service.gateway.gateway import Gateway, gateway_of
from service.gateway.openapi import errors
from service.gateway.responses import json_response
from service.metrics import render

logger = logging.getLogger(__name__)
router = APIRouter()


@router.head("/livez", include_in_schema=False)
@router.get("/livez", response_model=None, responses={200: {"model": ProbeResponse}})
async def livez() -> Response:
    """Whether this process answers at all. Restart it when it does not."""
    return json_response(ProbeResponse(status="ok"))


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=None, responses={200: {"model": ProbeResponse}, **errors(500, 503)})
async def readyz(request: Request) -> Response:
    """Whether to send requests here: the engine is well and the server is not going away."""
    gateway = gateway_of(request)
    gateway.drain.check_ready()
    report = await _health(gateway)
    _require_healthy(report)
    return json_response(ProbeResponse(status="asleep" if report.is_asleep else "ok"))


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=None, responses={200: {"model": HealthResponse}, **errors(500, 503)})
async def health(request: Request) -> Response:
    """Whether the engine makes progress with what it has."""
    report = await _health(gateway_of(request))
    _require_healthy(report)
    return json_response(HealthResponse(status="ok", seconds_since_progress=report.seconds_since_progress))


@router.get("/version", response_model=None, responses={200: {"model": VersionResponse}, **errors(401)})
async def version(request: Request) -> Response:
    """The version of this server."""
    return json_response(VersionResponse(version=gateway_of(request).version))


@router.get(
    "/metrics",
    response_model=None,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors(401, 403, 500)},
)
async def metrics(request: Request) -> Response:
    """All metrics, for Prometheus: of every gateway and every engine replica, whichever gateway answers."""
    found = await gateway_of(request).surveyor.survey()
    return Response(render(found.gateways, found.replicas, found.fleet), headers={"content-type": CONTENT_TYPE_LATEST})


async def _health(gateway: Gateway) -> EngineHealth:
    limit_s = gateway.settings.health_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await gateway.engine.health()
    except TimeoutError:
        return EngineHealth(False, f"the engine did not answer within {limit_s:g} s")
    except Exception:
        logger.exception("the engine's health could not be asked")
        return EngineHealth(False, "the engine cannot be reached")


def _require_healthy(report: EngineHealth) -> None:
    if not report.is_healthy:
        raise ApiError(503, f"the engine is not healthy: {report.reason}", code="engine_unhealthy")
