"""uvicorn as this project runs it: on a socket bound beforehand, with limits, and ended by draining.

Knows the transport alone: the application and what draining means are handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Generator, Sequence
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.gateway.drain import Drain
from service.gateway.errors import ApiError

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 4096
HEAD_TIMEOUT_S = 20.0
KEEP_ALIVE_S = 75
# Between the end of the last request and the end of the process, for responses still in socket buffers.
_CLOSE_TIMEOUT_S = 5


class _LongHeadError(Exception):
    """Makes the parser stop; what it then says of that comes after the answer."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with bounds uvicorn's fast parser lacks: the size of a head, the time it takes, open connections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._is_in_head = True
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm_head_timer()
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(ApiError(503, "too many open connections", code="overloaded"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._arm_head_timer()

    def on_headers_complete(self) -> None:
        # A head that came whole in one read has not been measured yet.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse_head()
            raise _LongHeadError
        self._is_in_head = False
        self._head_bytes = 0
        self._disarm_head_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        self._refuse(ApiError(400, "this is not HTTP/1.1", code="invalid_http"))

    def _arm_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_head_timeout)

    def _disarm_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._arm_head_timer()
        elif not self.transport.is_closing():
            message = f"the request's headers did not arrive within {HEAD_TIMEOUT_S:.0f} s"
            self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse_head(self) -> None:
        message = f"the request's headers are longer than {MAX_HEAD_BYTES} bytes"
        self._refuse(ApiError(431, message, code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answers and closes. Used where no request reaches the application."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(error.body())
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"x-content-type-options: nosniff\r\ncache-control: no-store\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """A server that says when it has started and leaves the process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _configure(app: Any, tls: ssl.SSLContext | None, trusted_proxies: Sequence[str]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=LimitedHttpProtocol,
        ws="none",
        loop="none",
        log_config=None,
        access_log=False,
        ssl_context_factory=None if tls is None else lambda *_: tls,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )


class ShutdownSignals:
    """SIGINT and SIGTERM while entered: the first asks to stop, the second to hurry, the third ends the process."""

    def __init__(self, on_hangup: Callable[[], None] | None = None) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGINT: self._on_signal,
            signal.SIGTERM: self._on_signal,
        }
        if on_hangup is not None:
            self._handlers[signal.SIGHUP] = on_hangup

    def __enter__(self) -> ShutdownSignals:
        self._loop = asyncio.get_running_loop()
        for number, handler in self._handlers.items():
            self._loop.add_signal_handler(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._handlers:
            self._loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if not self.stop.is_set():
            self.stop.set()
        elif not self.hurry.is_set():
            self.hurry.set()
        else:
            self.__exit__()
            os._exit(130)


async def serve(
    app: Any,
    sock: socket.socket,
    drain: Drain,
    *,
    drain_timeout_s: float,
    drain_delay_s: float = 0.0,
    on_ready: Callable[[], None],
    on_drain: Callable[[], None],
    on_hangup: Callable[[], None] | None = None,
    tls: ssl.SSLContext | None = None,
    trusted_proxies: Sequence[str] = (),
) -> int:
    """Serves `app` on `sock` until SIGINT or SIGTERM, then drains; a second signal cuts the draining short.

    Readiness turns red first; for `drain_delay_s` more, new requests are taken, until load balancers have noticed. Then
    they get the application's refusal, while those that run go on, for `drain_timeout_s` at most. SIGHUP calls
    `on_hangup`; without that it ends the process, as ever. `trusted_proxies` are the addresses whose X-Forwarded-For
    and X-Forwarded-Proto are believed. Returns how many requests were ended before their time. Raises OSError where
    `sock` cannot listen.
    """
    server = _Server(_configure(app, tls, trusted_proxies))
    with ShutdownSignals(on_hangup) as signals:
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await _first_of(server.is_ready.wait(), serving)
        if server.is_ready.is_set():
            on_ready()
            await _first_of(serving, signals.stop.wait())
        if not serving.done():
            on_drain()
        num_cut = await _end_requests(drain, drain_delay_s, drain_timeout_s, signals.hurry)
        server.should_exit = True
        await serving
    return num_cut


async def _end_requests(drain: Drain, delay_s: float, timeout_s: float, hurry: asyncio.Event) -> int:
    drain.announce()
    await _first_of(asyncio.sleep(delay_s), hurry.wait())
    drain.begin()
    logger.info("draining: %d requests are running and get %g s at most", drain.num_in_flight, timeout_s)
    idle = asyncio.create_task(drain.wait_idle(timeout_s))
    await _first_of(idle, hurry.wait())
    if idle.done():
        return idle.result()
    idle.cancel()
    return await drain.wait_idle(0.0)


async def _first_of(*awaitables: Awaitable[Any]) -> None:
    """Waits for the first to be done. Coroutines are cancelled then, tasks are left alone."""
    tasks = [asyncio.ensure_future(item) for item in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, item in zip(tasks, awaitables, strict=True):
            if task is not item:
                task.cancel()
