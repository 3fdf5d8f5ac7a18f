"""The port through which a gateway reaches an engine, wherever that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from service.engine.inspection import Inspection
from service.engine.request import Request, RequestOutput
from service.engine.stats import EngineHealth, EngineInfo, EngineStats, Fleet


class EngineClient(Protocol):
    """One engine or many behind one door: in this process, over Ray, or a twin for tests."""

    async def info(self) -> EngineInfo:
        """What is served. Constant while the client lives."""
        ...

    async def deliver(self, request: Request, listener: Callable[[RequestOutput], None]) -> None:
        """Gives `listener` each step's new ids as they come, until one output `is_finished`, exactly once, and returns.

        Raises an `EngineError` before the first output when the request is not accepted. A failure after that is a
        terminal output with `FinishReason.ERROR`. Cancelling it aborts the request and frees its memory; `listener`
        then hears nothing more. An output costs a call and no task switch, which is why this is no generator.
        """
        ...

    async def health(self) -> EngineHealth:
        """Tied to step progress: red when the engine died or is stuck with work queued."""
        ...

    async def stats(self, *, max_age_s: float = 0.0) -> Sequence[EngineStats]:
        """One snapshot per replica, taken at most `max_age_s` ago where that spares asking."""
        ...

    def fleet(self) -> Fleet | None:
        """As last known; None where it is not."""
        ...

    async def inspect(self, seconds: float = 0.0) -> Sequence[Inspection]:
        """A look into each replica that answers, with its steps and ended requests of the last `seconds`."""
        ...

    async def close(self) -> None:
        """Ends whatever still runs and lets go of the engine."""
        ...
