"""One keep-alive connection that sends a request and notes when each piece of the answer came. Knows no SSE.

Reading costs the client as little as it can: while an answer streams, each piece is put on a list with its time, and
nothing is parsed before the piece that may be the last.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import cast

from loadtests.http1 import Framing, Head, Span, chunk_spans, parse_head
from loadtests.target import Target

MAX_RESPONSE_BYTES = 64 * 1024 * 1024


class Disconnected(ConnectionError):  # noqa: N818 - named for what happened
    """The server closed the connection before its answer was complete. `received` is what there was of it."""

    def __init__(self, received: Answer | None) -> None:
        super().__init__("the server closed the connection before the end of its answer")
        self.received = received


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it came. `arrivals` are (end offset in `received`, seconds on `perf_counter`), ascending."""

    head: Head
    received: bytes
    spans: tuple[Span, ...]
    arrivals: tuple[tuple[int, float], ...]

    @property
    def body(self) -> bytes:
        return b"".join([self.received[start:end] for start, end in self.spans])

    @property
    def ended_s(self) -> float:
        return self.arrivals[-1][1]


class Connection(asyncio.Protocol):
    """One request at a time; open it with `connect`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._pieces: list[bytes] = []
        self._times: list[float] = []
        self._size = 0
        self._head: Head | None = None
        self.is_open = False

    @classmethod
    async def connect(cls, target: Target) -> Connection:
        """Raises OSError where nothing listens."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, target.address, target.port)
        return connection

    async def exchange(self, request: bytes) -> Answer:
        """Sends `request` and returns the whole answer.

        Raises Disconnected, or MalformedResponse for bytes that are not HTTP. Cancelling it closes the connection:
        to a server, that is a client that went away.
        """
        assert self._transport is not None
        self._pieces, self._times, self._size, self._head = [], [], 0, None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.close()
            raise

    def abandon(self) -> None:
        """Hangs up now. A waiter gets Disconnected with what had come."""
        self._cut()
        self.close()

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._times.append(perf_counter())
        self._pieces.append(data)
        self._size += len(data)
        if self._head is None or self._may_be_last(data) or self._size > MAX_RESPONSE_BYTES:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answer is None or self._answer.done():
            return
        if self._head is not None and self._head.framing is Framing.CLOSE and exc is None:
            received = b"".join(self._pieces)
            self._finish(received, ((self._head.end, len(received)),))
        else:
            self._cut()

    def _may_be_last(self, data: bytes) -> bool:
        """Cheap, and never wrong in saying no: the end of a chunked body is an empty line after a chunk of size 0."""
        head = self._head
        assert head is not None
        if head.framing is Framing.CHUNKED:
            return len(data) < 5 or (data.endswith(b"\r\n\r\n") and b"0\r\n" in data)
        return head.framing is Framing.LENGTH and self._size >= head.end + head.length

    def _look(self) -> None:
        """Reads what came so far, and answers the waiter if that is all or nonsense."""
        if self._answer is None or self._answer.done():
            self.close()  # bytes that nobody asked for
            return
        received = b"".join(self._pieces)
        try:
            self._read(received)
        except Exception as error:
            self._answer.set_exception(error)

    def _read(self, received: bytes) -> None:
        if len(received) > MAX_RESPONSE_BYTES:
            raise OverflowError(f"an answer of more than {MAX_RESPONSE_BYTES} bytes")
        self._head = self._head or parse_head(received)
        if self._head is None:
            return
        start, length = self._head.end, self._head.length
        if self._head.framing is Framing.CHUNKED:
            spans, is_whole = chunk_spans(received, start)
            if is_whole:
                self._finish(received, tuple(spans))
        elif self._head.framing is Framing.LENGTH and len(received) >= start + length:
            self._finish(received, ((start, start + length),))

    def _finish(self, received: bytes, spans: tuple[Span, ...]) -> None:
        assert self._answer is not None
        assert self._head is not None
        if not self._head.keep_alive:
            self.close()
        self._answer.set_result(Answer(self._head, received, spans, self._arrivals()))

    def _cut(self) -> None:
        """Answers a waiter with Disconnected and as much of the answer as came."""
        if self._answer is None or self._answer.done():
            return
        received = b"".join(self._pieces)
        answer = None
        if self._head is not None:
            spans = [(self._head.end, len(received))]
            if self._head.framing is Framing.CHUNKED:
                spans, _ = chunk_spans(received, self._head.end)
            answer = Answer(self._head, received, tuple(spans), self._arrivals())
        self._answer.set_exception(Disconnected(answer))

    def _arrivals(self) -> tuple[tuple[int, float], ...]:
        return tuple(zip(accumulate(map(len, self._pieces)), self._times, strict=True))
