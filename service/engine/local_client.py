"""The engine client for an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from service.engine.async_engine import AsyncEngine
from service.engine.inspection import Inspection
from service.engine.request import Request, RequestOutput
from service.engine.stats import EngineHealth, EngineInfo, EngineStats, Fleet


class LocalEngineClient:
    """Implements the gateway's `EngineClient` over an `AsyncEngine` on the same loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def info(self) -> EngineInfo:
        return self._engine.info

    async def deliver(self, request: Request, listener: Callable[[RequestOutput], None]) -> None:
        """See `EngineClient.deliver`."""
        ended = asyncio.get_running_loop().create_future()

        def hear(output: RequestOutput) -> None:
            if not ended.done():
                listener(output)
                if output.is_finished:
                    ended.set_result(None)

        self._engine.submit(request, hear)
        try:
            await ended
        finally:
            # Cancelling whoever waits for a future cancels the future.
            if ended.cancelled():
                self._engine.abort(request.request_id)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs, for a reader with a pace of its own. Leaving early, in any way, aborts the request."""
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._engine.submit(request, outputs.put_nowait)
        is_finished = False
        try:
            while not is_finished:
                output = await outputs.get()
                is_finished = output.is_finished
                yield output
        finally:
            if not is_finished:
                self._engine.abort(request.request_id)

    async def health(self) -> EngineHealth:
        return self._engine.health()

    async def stats(self, *, max_age_s: float = 0.0) -> list[EngineStats]:  # noqa: ARG002 - it costs nothing to ask
        return [self._engine.stats()]

    def fleet(self) -> Fleet:
        return Fleet(num_wanted=1, num_running=1)

    async def inspect(self, seconds: float = 0.0) -> list[Inspection]:
        return [self._engine.inspect(seconds)]

    async def close(self) -> None:
        await self._engine.close()
