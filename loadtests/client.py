"""Sends one completion request and says what became of it. Whatever happens, there is exactly one record."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import replace
from time import perf_counter
from typing import Any

from loadtests.connection import Answer, Connection, Disconnected
from loadtests.errors import ServerError
from loadtests.http1 import MalformedResponse
from loadtests.record import Phase, RequestRecord
from loadtests.stream import CompletionStream, error_message, read_stream
from loadtests.target import Target

_FAILED_FINISHES = frozenset({"error", "abort"})


class CompletionClient:
    """Keep-alive connections to one target, as many as there are requests at a time."""

    def __init__(self, target: Target, *, timeout_s: float, api_key: str | None = None) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: deque[Connection] = deque()
        self._active: set[Connection] = set()
        self._is_abandoned = False

    async def complete(self, body: bytes, index: int, phase: Phase, *, planned_s: float | None = None) -> RequestRecord:
        """One streamed completion. Never raises but for cancellation, which closes the connection."""
        request = self._request("POST", "/v1/completions", body)
        started_s = perf_counter()
        lateness_s = 0.0 if planned_s is None else max(0.0, started_s - planned_s)
        return await self._attempt(request, index, phase, started_s, lateness_s)

    async def get_json(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of a plain GET; an empty object where the answer is none. Raises OSError."""
        answer = await self.get(path)
        try:
            value = json.loads(answer.body)
        except ValueError:
            value = {}
        return answer.head.status, value if isinstance(value, dict) else {}

    async def get(self, path: str) -> Answer:
        """The whole answer to a plain GET. Raises OSError, TimeoutError or MalformedResponse."""
        async with asyncio.timeout(self._timeout_s):
            return await self._exchange(self._request("GET", path))

    async def post(self, path: str, body: bytes) -> Answer:
        """The whole answer, as it came. Raises OSError, TimeoutError or MalformedResponse. Cancelling it hangs up."""
        async with asyncio.timeout(self._timeout_s):
            return await self._exchange(self._request("POST", path, body))

    async def first_model(self) -> str:
        """The name under which the server serves its first model. Raises ServerError."""
        try:
            status, models = await self.get_json("/v1/models")
        except (OSError, MalformedResponse) as error:
            raise ServerError(f"{self._target.url}: {error or type(error).__name__}") from error
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self._target.url}/v1/models answers {status} and names no model") from None

    def abandon(self) -> None:
        """Hangs up, for good: each request in flight becomes a record of what had come, "disconnected"."""
        self._is_abandoned = True
        for connection in tuple(self._active):
            connection.abandon()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _attempt(
        self, request: bytes, index: int, phase: Phase, started_s: float, lateness_s: float
    ) -> RequestRecord:
        answer: Answer | None = None
        error, message = None, None
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._exchange(request)
        except TimeoutError:
            error, message = "timeout", f"no complete answer in {self._timeout_s:g} s"
        except Disconnected as problem:
            error, message, answer = "disconnected", str(problem), problem.received
        except (MalformedResponse, OverflowError) as problem:
            error, message = "malformed", str(problem)
        except OSError as problem:
            error, message = "unreachable", problem.strerror or str(problem)
        e2e_s = (perf_counter() if answer is None else answer.ended_s) - started_s
        base = RequestRecord(index, phase, started_s, e2e_s, error=error, message=message, lateness_s=lateness_s)
        return base if answer is None else _read(base, answer)

    async def _exchange(self, request: bytes) -> Answer:
        """On an idle connection if there is one. A server may close an idle one at any time: then on a new one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                return await self._use(connection, request)
            except Disconnected as problem:
                if problem.received is not None or self._is_abandoned:
                    raise
        return await self._use(await Connection.connect(self._target), request)

    async def _use(self, connection: Connection, request: bytes) -> Answer:
        if self._is_abandoned:
            connection.close()
            raise Disconnected(None)
        self._active.add(connection)
        try:
            answer = await connection.exchange(request)
        finally:
            self._active.discard(connection)
        if connection.is_open:
            self._idle.append(connection)
        return answer

    def _request(self, method: str, path: str, body: bytes = b"") -> bytes:
        head = (
            f"{method} {self._target.prefix}{path} HTTP/1.1\r\n"
            f"Host: {self._target.host}:{self._target.port}\r\n"
            f"{self._authorization}"
            "Accept: text/event-stream, application/json\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _read(base: RequestRecord, answer: Answer) -> RequestRecord:
    status = answer.head.status
    if status != 200:
        return replace(base, status=status, error=base.error or f"http_{status}", message=error_message(answer.body))
    stream = read_stream(answer)
    error, message = (base.error, base.message) if base.error else _verdict(stream)
    usage = stream.usage
    return replace(
        base,
        status=status,
        error=error,
        message=message,
        times_s=stream.times_s,
        token_counts=stream.token_counts,
        has_usage=usage is not None,
        output_tokens=usage.completion_tokens if usage else sum(stream.token_counts or (1,) * len(stream.times_s)),
        prompt_tokens=usage.prompt_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
        finish_reason=stream.finish_reason,
    )


def _verdict(stream: CompletionStream) -> tuple[str | None, str | None]:
    """The error and message of a stream that ended by itself; (None, None) of a good one."""
    if stream.error is not None:
        return "stream_error", stream.error
    if stream.finish_reason in _FAILED_FINISHES:
        return "stream_error", f"finish reason {stream.finish_reason}"
    if stream.finish_reason is None and not stream.is_done:
        return "incomplete", "the stream ended without a finish reason or [DONE]"
    if not stream.times_s and not (stream.usage and stream.usage.completion_tokens):
        return "empty", "the stream ended without a token"
    return None, None
