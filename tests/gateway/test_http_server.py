"""The HTTP server below the application: its limits, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.gateway import http_server
from service.gateway.address import TcpAddress
from service.gateway.drain import Drain
from service.gateway.errors import ApiError, DrainingError


class SlowApp:
    """An ASGI application whose requests last until `finish`, or until they are told to fail."""

    def __init__(self, drain: Drain) -> None:
        self.drain = drain
        self.finish = asyncio.Event()
        self.started = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        try:
            with self.drain.flight(failure.set_result):
                body = await self._answer(scope["path"], failure)
        except ApiError as error:
            body = error.code.encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, path: str, failure: asyncio.Future[Exception]) -> bytes:
        if path == "/fast":
            return b"fast"
        self.started.set()
        finishing = asyncio.create_task(self.finish.wait())
        await asyncio.wait({finishing, failure}, return_when=asyncio.FIRST_COMPLETED)
        finishing.cancel()
        return b"failed" if failure.done() else b"finished"


class Running:
    """A server on this loop, and what it has said."""

    def __init__(self, drain_timeout_s: float = 5.0, drain_delay_s: float = 0.0) -> None:
        drain = Drain(retry_after_s=1.0, grace_s=0.5)
        self.app = SlowApp(drain)
        self.sock = TcpAddress("127.0.0.1", 0).bind()
        self.port: int = self.sock.getsockname()[1]
        self.is_ready = asyncio.Event()
        self.is_draining = asyncio.Event()
        self.task = asyncio.create_task(
            http_server.serve(
                self.app,
                self.sock,
                drain,
                drain_timeout_s=drain_timeout_s,
                drain_delay_s=drain_delay_s,
                on_ready=self.is_ready.set,
                on_drain=self.is_draining.set,
            )
        )

    async def send(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        return reader, writer

    async def ask(self, path: str) -> bytes:
        """The body of an answer to a request on a connection of its own."""
        reader, writer = await self.send(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return (await read_all(reader, writer)).split(b"\r\n\r\n", 1)[1]


async def read_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    async with asyncio.timeout(60):
        data = await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return data


def error_of(data: bytes) -> tuple[int, dict[str, object]]:
    head, body = data.split(b"\r\n\r\n", 1)
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]


@contextlib.asynccontextmanager
async def running(drain_timeout_s: float = 5.0, drain_delay_s: float = 0.0) -> AsyncIterator[Running]:
    server = Running(drain_timeout_s, drain_delay_s)
    async with asyncio.timeout(60):
        await server.is_ready.wait()
    yield server
    if not server.task.done():
        server.app.finish.set()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(60):
            await server.task


async def test_it_serves_and_keeps_connections_open() -> None:
    async with running() as server:
        reader, writer = await server.send(b"GET /fast HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
        data = await reader.readuntil(b"fast")
        data += await reader.readuntil(b"fast")
        assert data.count(b"200 OK") == 2
        assert not reader.at_eof()
        writer.close()


@pytest.mark.parametrize("piece", [b"x-long: " + b"a" * 50_000, b"a" * 50_000], ids=["in a value", "in a name"])
async def test_headers_without_end_are_refused(piece: bytes) -> None:
    async with running() as server:
        reader, writer = await server.send(b"GET /fast HTTP/1.1\r\n" + piece)
        writer.write(b"a" * 50_000)
        status, error = error_of(await read_all(reader, writer))
        assert (status, error["code"]) == (431, "headers_too_large")


async def test_many_headers_are_refused() -> None:
    async with running() as server:
        reader, writer = await server.send(b"GET /fast HTTP/1.1\r\n")
        writer.write(b"x: y\r\n" * 20_000)
        status, error = error_of(await read_all(reader, writer))
        assert (status, error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /fast HTTP/1.1\r\nx: " + b"a" * 70_000,
        b"GET /fast?" + b"a" * 70_000 + b" HTTP/1.1",
        b"GET /fast HTTP/1.1" + b"\r\nx: yz" * 10_000,
        b"POST /fast HTTP/1.1\r\ncontent-length: 4\r\nx: " + b"a" * 70_000 + b"\r\n\r\nbody",
    ],
    ids=["a value", "a path", "many", "before a body"],
)
async def test_a_head_that_comes_whole_has_the_same_limit(head: bytes) -> None:
    async with running() as server:
        status, error = error_of(await read_all(*await server.send(head + b"\r\n\r\n")))
        assert (status, error["code"]) == (431, "headers_too_large")


async def test_a_large_head_below_the_limit_is_taken() -> None:
    async with running() as server:
        reader, writer = await server.send(
            b"GET /fast HTTP/1.1\r\nconnection: close\r\nx: " + b"a" * 60_000 + b"\r\n\r\n"
        )
        assert (await read_all(reader, writer)).endswith(b"fast")


@pytest.mark.parametrize("start", [b"", b"GET /fast HT", b"GET /fast HTTP/1.1\r\nhost: x\r\n"])
async def test_headers_that_do_not_come_are_given_up(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.1)
    async with running() as server:
        reader, writer = await server.send(start)
        status, error = error_of(await read_all(reader, writer))
        assert (status, error["code"]) == (408, "request_timeout")


async def test_a_half_sent_request_does_not_cut_the_answer_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.1)
    async with running() as server:
        reader, writer = await server.send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\nGET /fa")
        await asyncio.sleep(0.3)
        server.app.finish.set()
        data = await read_all(reader, writer)
        first, rest = data.split(b"finished", 1)
        assert b"200 OK" in first
        assert error_of(rest)[0] == 408


async def test_a_long_answer_outlasts_the_header_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    async with running() as server:
        answer = asyncio.create_task(server.ask("/slow"))
        await asyncio.sleep(0.2)
        server.app.finish.set()
        assert await answer == b"finished"


async def test_connections_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 2)
    async with running() as server:
        kept = [await server.send(b"GET /fast HTTP/1.1\r\nhost: x\r\n\r\n") for _ in range(2)]
        for reader, _ in kept:
            await reader.readuntil(b"fast")
        status, error = error_of(await read_all(*await server.send(b"")))
        assert (status, error["code"]) == (503, "overloaded")
        for reader, writer in kept:
            writer.write(b"GET /fast HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert b"200 OK" in await read_all(reader, writer)
        assert await server.ask("/fast") == b"fast"


async def test_what_is_not_http_gets_the_common_error() -> None:
    async with running() as server:
        status, error = error_of(await read_all(*await server.send(b"\x16\x03\x01 hello\r\n\r\n")))
        assert (status, error["code"], error["param"]) == (400, "invalid_http", None)


async def test_a_signal_drains() -> None:
    async with running() as server:
        answer = asyncio.create_task(server.ask("/slow"))
        await server.app.started.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await server.is_draining.wait()
        assert await server.ask("/slow") == b"draining"
        assert not server.task.done()
        server.app.finish.set()
        assert await answer == b"finished"
        assert await server.task == 0
        with pytest.raises(ConnectionRefusedError):
            await server.ask("/fast")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_ends_what_is_running(second: signal.Signals) -> None:
    async with running(drain_timeout_s=60) as server:
        answer = asyncio.create_task(server.ask("/slow"))
        await server.app.started.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await server.is_draining.wait()
        os.kill(os.getpid(), second)
        assert await answer == b"failed"
        assert await server.task == 1


async def test_draining_ends_in_time() -> None:
    async with running(drain_timeout_s=0.2) as server:
        answer = asyncio.create_task(server.ask("/slow"))
        await server.app.started.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await answer == b"failed"
        assert await server.task == 1


async def test_readiness_turns_red_before_requests_are_refused() -> None:
    async with running(drain_delay_s=60) as server:
        drain = server.app.drain
        drain.check_ready()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(60):
            await server.is_draining.wait()
        while not drain.is_announced:
            await asyncio.sleep(0.001)
        with pytest.raises(DrainingError):
            drain.check_ready()
        drain.check()
        assert await server.ask("/fast") == b"fast"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.task == 0


async def test_signals_have_their_old_meaning_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with running() as server:
        os.kill(os.getpid(), signal.SIGTERM)
        await server.task
    assert signal.getsignal(signal.SIGTERM) == before
