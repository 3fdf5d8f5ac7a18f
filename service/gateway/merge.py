"""Reading the engine's answers to one completion: one wait for whatever comes next, one place that ends them all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import NamedTuple, Self

from service.engine.request import RequestOutput
from service.gateway.errors import GenerationFailedError

logger = logging.getLogger(__name__)

Source = Callable[[Callable[[RequestOutput], None]], Coroutine[None, None, None]]
"""Gives what it is called with every output of one answer, as `EngineClient.deliver` does."""


class Arrival(NamedTuple):
    """One engine output, which answer it belongs to, and when it came (`time.perf_counter` seconds)."""

    source_index: int
    output: RequestOutput
    at_s: float


class OutputMerge:
    """Asks every source in a task of its own; what arrives while the caller is busy is taken in one go.

    Use as an async context manager: on leaving it, every source that has not ended is cancelled, which aborts its
    request. Ends that take longer than `abort_timeout_s` are logged and not waited for.
    """

    def __init__(self, sources: Sequence[Source], abort_timeout_s: float) -> None:
        self._sources = sources
        self._abort_timeout_s = abort_timeout_s
        self._tasks: list[asyncio.Task[None]] = []
        self._arrived: list[Arrival] = []
        self._error: Exception | None = None
        self._is_cut = False
        self._finished: set[int] = set()
        self._dropped: set[int] = set()
        self._is_poked = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._ask(i, source)) for i, source in enumerate(self._sources)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        late = (await asyncio.wait(self._tasks, timeout=self._abort_timeout_s))[1]
        if late:
            logger.error("%d engine requests did not end within %s s of their abort", len(late), self._abort_timeout_s)

    async def take(self) -> list[Arrival]:
        """What arrived since the last call, in order; waits for at least one, or for `poke`. For one task only.

        Raises what a source raised once everything before it was taken, or what `fail` was given at once.
        """
        while self._is_cut or not self._arrived:
            if self._error is not None:
                raise self._error
            if self._is_poked:
                self._is_poked = False
                return []
            self._waiter = self._loop.create_future()
            await self._waiter
        arrived, self._arrived = self._arrived, []
        return arrived

    def drop(self, index: int) -> None:
        """Aborts one request whose further outputs nobody wants; `take` may still give some."""
        self._dropped.add(index)
        self._tasks[index].cancel()

    def poke(self) -> None:
        """Makes `take` return without anything, if there is nothing."""
        self._is_poked = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Makes `take` raise `error` now, whatever else has arrived. The first call counts."""
        if not self._is_cut:
            self._is_cut = True
            self._error = error
            self._wake()

    async def _ask(self, index: int, source: Source) -> None:
        try:
            await source(partial(self._arrive, index))
            if index not in self._finished:
                logger.error("an engine's answer ended without a finished output")
                self._end(GenerationFailedError())
        except asyncio.CancelledError:
            # Without this a source that cancels itself would leave its reader waiting for ever.
            if index not in self._dropped:
                self._end(GenerationFailedError())
            raise
        except Exception as error:
            self._end(error)

    def _arrive(self, index: int, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self._finished.add(index)
        self._arrived.append(Arrival(index, output, time.perf_counter()))
        self._wake()

    def _end(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
