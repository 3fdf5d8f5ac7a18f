"""The engine client for an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

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

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See `EngineClient.generate`: leaving the generator early, in any way, aborts the request."""
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
