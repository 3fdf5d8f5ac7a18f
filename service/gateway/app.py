"""Puts the gateway together. The launcher owns the engine and the server; this owns what lies between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.engine.errors import EngineError
from service.gateway import completions, dashboard, debug, models, probes, tokenization
from service.gateway.api_keys import KeyRing
from service.gateway.auth import Authenticator, is_open
from service.gateway.client import EngineClient
from service.gateway.drain import Drain
from service.gateway.errors import ApiError, to_api_error
from service.gateway.gateway import Gateway
from service.gateway.grammar_check import GrammarChecker
from service.gateway.history import History
from service.gateway.host_guard import HostGuard
from service.gateway.observer import Observer
from service.gateway.openapi import describe_keys
from service.gateway.pages import pages_router
from service.gateway.peers import NoPeers, Peers
from service.gateway.rate_limit import RateLimiter
from service.gateway.responses import error_response
from service.gateway.served_model import ServedModel
from service.gateway.settings import GatewaySettings
from service.gateway.survey import Surveyor
from service.gateway.tracer import ExchangeTracer
from service.metrics import GatewayMetrics
from service.version import package_version

_EXPOSED_HEADERS = (
    *("x-request-id", "retry-after"),
    *(f"x-ratelimit-{what}-{noun}" for noun in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)


def create_app(
    engine: EngineClient,
    served: ServedModel,
    settings: GatewaySettings | None = None,
    peers: Peers | None = None,
    keys: KeyRing | None = None,
    tracer: ExchangeTracer | None = None,
) -> FastAPI:
    """The gateway as an ASGI application. `app.state.gateway` is its `Gateway`, `app.state.drain` its `Drain`.

    Neither starts nor closes `engine`. `peers` are the other gateways that listen at the same address. Without `keys`
    everybody may use it. `tracer` hears of every exchange.
    """
    settings = settings or GatewaySettings()
    version = package_version()
    drain = Drain(settings.drain_retry_after_s, settings.drain_grace_s)
    metrics = GatewayMetrics(served.info, version, settings.name)
    metrics.draining.read = lambda: drain.is_draining
    metrics.in_flight.read = lambda: drain.num_in_flight
    # The documentation pages would load scripts from elsewhere; the document itself stays.
    app = FastAPI(
        title="Tessera", version=version, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=_sampled
    )
    limiter = RateLimiter(settings.requests_per_minute, settings.tokens_per_minute)
    grammars = GrammarChecker(served.written_tokens)
    surveyor = Surveyor(metrics, engine, peers or NoPeers(), settings.stats_timeout_s)
    app.state.gateway = Gateway(
        engine, served, settings, metrics, drain, limiter, grammars, surveyor, History(), version
    )
    app.state.drain = drain
    for kind in (ApiError, EngineError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    routers = (completions.router, models.router, tokenization.router, probes.router, dashboard.router, debug.router)
    for router in (*routers, pages_router(settings.root_path)):
        app.include_router(router)
    if keys is not None:
        app.add_middleware(Authenticator, keys=keys, has_public_metrics=settings.has_public_metrics)
        describe_keys(app, partial(is_open, has_public_metrics=settings.has_public_metrics))
    if settings.cors_origins:
        app.add_middleware(
            _Cors,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id", "x-session-id"),
            expose_headers=_EXPOSED_HEADERS,
        )
    if settings.allowed_hosts:
        app.add_middleware(HostGuard, names=settings.allowed_hosts)
    app.add_middleware(Observer, metrics=metrics, slow_request_s=settings.slow_request_s, tracer=tracer)
    if settings.root_path:
        app.add_middleware(_RootPath, root_path=settings.root_path)
    return app


@contextlib.asynccontextmanager
async def _sampled(app: FastAPI) -> AsyncIterator[None]:
    """While the application is served, its gateway's history is written; then its grammars are checked no more."""
    gateway: Gateway = app.state.gateway
    sampling = asyncio.create_task(gateway.history.run(gateway.surveyor))
    try:
        yield
    finally:
        sampling.cancel()
        gateway.grammars.close()


class _RootPath:
    """Tells all inside under which path a proxy shows this server; without a slash after it, it is the page."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._root_path
            if scope["path"] == self._root_path:
                scope["path"] += "/"
        await self._app(scope, receive, send)


class _Cors(CORSMiddleware):
    """Refuses in the shape of all other errors."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        reason = bytes(response.body).decode()
        return error_response(ApiError(response.status_code, reason, code="cors_refused"))


async def _answer_error(_: Request, error: Exception) -> Response:
    return error_response(to_api_error(error))
