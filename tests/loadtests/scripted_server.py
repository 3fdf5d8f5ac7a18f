"""A completions server that does what a script says, and remembers when. `python FILE PORT` runs it alone."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Script:
    """One answer. `delays_s` are the waits before each event with text."""

    delays_s: Sequence[float] = (0.0, 0.0, 0.0)
    tokens_per_event: int = 1
    status: int = 200
    is_silent: bool = False
    newline: bytes = b"\n"
    is_chunked: bool = True
    cut_after: int | None = None
    error_after: int | None = None
    has_usage: bool = True
    has_end: bool = True
    keep_alive: bool = True
    finish_reason: str = "length"


@dataclass
class ScriptedServer:
    """Serves `script(i)` to the i-th completion request."""

    script: Callable[[int], Script]
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    asked_s: list[float] = field(default_factory=list)
    sent_s: list[list[float]] = field(default_factory=list)
    num_connections: int = 0
    num_hung_up: int = 0
    num_in_flight: int = 0
    most_in_flight: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test ends
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        length = next(
            (int(line.split(":")[1]) for line in head.lower().split("\r\n") if line.startswith("content-length")), 0
        )
        body = await reader.readexactly(length)
        if path != "/v1/completions":
            self._plain(writer, 200, {"data": [{"id": "scripted"}]} if path == "/v1/models" else {})
            return True
        index = len(self.bodies)
        self.bodies.append(json.loads(body))
        self.asked_s.append(perf_counter())
        self.sent_s.append([])
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        try:
            return await self._complete(self.script(index), index, writer)
        finally:
            self.num_in_flight -= 1

    async def _complete(self, script: Script, index: int, writer: asyncio.StreamWriter) -> bool:
        if script.is_silent:
            return False
        if script.status != 200:
            self._plain(writer, script.status, {"error": {"message": f"scripted {script.status}", "code": "x"}})
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            + (b"Transfer-Encoding: chunked\r\n" if script.is_chunked else b"")
            + (b"" if script.keep_alive and script.is_chunked else b"Connection: close\r\n")
            + b"\r\n"
        )
        for i, delay_s in enumerate(script.delays_s):
            if i in (script.cut_after, script.error_after):
                break
            await asyncio.sleep(delay_s)
            if writer.is_closing():
                self.num_hung_up += 1
                return False
            self._event(script, writer, _choice(" word" * script.tokens_per_event))
            self.sent_s[index].append(perf_counter())
            await writer.drain()
        if script.cut_after is not None:
            return False
        self._end(script, writer)
        return script.keep_alive and script.is_chunked

    def _end(self, script: Script, writer: asyncio.StreamWriter) -> None:
        if script.error_after is not None:
            self._event(script, writer, {"error": {"message": "scripted failure", "type": "server_error"}})
        elif script.has_end:
            self._event(script, writer, _choice("", script.finish_reason))
            if script.has_usage:
                self._event(script, writer, {"choices": [], "usage": _usage(script)})
            self._write(script, writer, b"data: [DONE]" + script.newline * 2)
        if script.is_chunked:
            writer.write(b"0\r\n\r\n")

    def _event(self, script: Script, writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
        self._write(script, writer, b"data: " + json.dumps(value).encode() + script.newline * 2)

    def _write(self, script: Script, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data) if script.is_chunked else data)

    def _plain(self, writer: asyncio.StreamWriter, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d Scripted\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))


def _choice(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None}


def _usage(script: Script) -> dict[str, int]:
    return {"prompt_tokens": 8, "completion_tokens": len(script.delays_s) * script.tokens_per_event, "total_tokens": 0}


@asynccontextmanager
async def serving(script: Script | Callable[[int], Script]) -> AsyncGenerator[ScriptedServer]:
    """A server on a free port of this event loop."""
    scripted = ScriptedServer((lambda _: script) if isinstance(script, Script) else script)
    server = await asyncio.start_server(scripted.handle, "127.0.0.1", 0)
    scripted.port = server.sockets[0].getsockname()[1]
    try:
        yield scripted
    finally:
        server.close()
        for task in scripted.tasks:
            task.cancel()
        await asyncio.gather(*scripted.tasks)


async def _main(port: int) -> None:
    scripted = ScriptedServer(lambda _: Script(delays_s=(0.005,) * 8))
    server = await asyncio.start_server(scripted.handle, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
