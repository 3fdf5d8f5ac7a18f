"""What waits in a replica for one gateway's stream to take it. Knows neither the stream nor the engine."""

from __future__ import annotations

import asyncio
from collections import deque

from service.engine.request import RequestOutput
from service.wire import Pulse, StepMessage, merge, pack

_MAX_LOG_LINES = 100


class Mailbox:
    """Outputs of one gateway's requests, on one event loop, with one reader.

    All that an engine step posts is read as one message. While the reader is behind, outputs of one request merge, so
    that the size is bounded by the requests and their tokens, not by how long the reader stays away.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, RequestOutput] = {}
        self._pulse: Pulse | None = None
        self._log: deque[str] = deque(maxlen=_MAX_LOG_LINES)
        self._has_news = asyncio.Event()
        self._is_closing = False

    def put(self, output: RequestOutput) -> None:
        """Adds what a step produced for one request."""
        self._outputs[output.request_id] = merge(self._outputs.get(output.request_id), output)
        self._has_news.set()

    def beat(self, pulse: Pulse) -> None:
        """Tells the reader how the replica is; a pulse not yet read is replaced."""
        self._pulse = pulse
        self._has_news.set()

    def log(self, line: str) -> None:
        """Tells the reader what an operator should see; of many lines, the last."""
        self._log.append(line)
        self._has_news.set()

    def close(self) -> None:
        """Nothing more will come; what is there can still be taken."""
        self._is_closing = True
        self._has_news.set()

    @property
    def is_closed(self) -> bool:
        """Whether all has been taken that will ever come."""
        return self._is_closing and not self._has_news.is_set()

    async def take(self) -> StepMessage:
        """Everything there is; waits for the first. Empty once after `close`, if there is nothing else."""
        await self._has_news.wait()
        self._has_news.clear()
        message = StepMessage([pack(output) for output in self._outputs.values()], self._pulse, tuple(self._log))
        self._outputs, self._pulse = {}, None
        self._log.clear()
        return message
