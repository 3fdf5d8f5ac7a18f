"""Going away without dropping anybody: what is in flight, and how it is brought to an end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from service.gateway.errors import DrainingError


class Drain:
    """Counts the requests in flight and, once begun, refuses new ones.

    A launcher calls `announce`, may wait for load balancers to notice, calls `begin`, then `wait_idle`, and then stops
    the server.
    """

    def __init__(self, retry_after_s: float, grace_s: float) -> None:
        self._retry_after_s = retry_after_s
        self._grace_s = grace_s
        self._is_announced = False
        self._is_draining = False
        self._flights: dict[asyncio.Task[object], Callable[[Exception], None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_announced(self) -> bool:
        return self._is_announced

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    def announce(self) -> None:
        """From now on the server is not ready; it still takes completions."""
        self._is_announced = True

    def begin(self) -> None:
        """From now on the server is not ready and takes no new completions; those in flight go on."""
        self._is_announced = self._is_draining = True

    def check_ready(self) -> None:
        """Raises DrainingError once the end has been announced."""
        if self._is_announced:
            raise DrainingError(self._retry_after_s)

    def check(self) -> None:
        """Raises DrainingError once draining has begun."""
        if self._is_draining:
            raise DrainingError(self._retry_after_s)

    @contextlib.contextmanager
    def flight(self, fail: Callable[[Exception], None]) -> Iterator[None]:
        """The current task answers a request inside this context; `fail` makes it end with an error soon.

        Raises DrainingError once draining has begun.
        """
        self.check()
        task = asyncio.current_task()
        assert task is not None
        self._flights[task] = fail
        self._idle.clear()
        try:
            yield
        finally:
            del self._flights[task]
            if not self._flights:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> int:
        """Waits until nothing is in flight; what still is after `timeout_s` is ended with an error.

        Returns how many requests were ended so. Their clients get a moment to read the error; a client that does not
        read at all is disconnected.
        """
        if await self._is_idle_within(timeout_s):
            return 0
        late = dict(self._flights)
        for fail in late.values():
            fail(DrainingError(self._retry_after_s))
        if not await self._is_idle_within(self._grace_s):
            for task in self._flights:
                task.cancel()
            await self._is_idle_within(self._grace_s)
        return len(late)

    async def _is_idle_within(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return not self._flights
