"""What a replica does with its gateways' requests, without Ray beneath it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from service.config import EngineConfig
from service.engine.request import FinishReason, Request, RequestOutput
from service.engine.stats import EngineHealth
from service.wire import Hello, Verdict
from tests.engine.scripted import make_request
from tests.gateway.fake_engine import INFO

if TYPE_CHECKING:
    from service.ray_engine import ServedEngine

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


class PreparingEngine:
    """An engine whose requests all wait for their grammars: to abort one ends it at once."""

    info = INFO

    def __init__(self) -> None:
        self.listeners: dict[str, Callable[[RequestOutput], None]] = {}

    def start(self) -> None:
        pass

    def submit(self, request: Request, listener: Callable[[RequestOutput], None]) -> None:
        self.listeners[request.request_id] = listener

    def abort(self, request_id: str) -> None:
        self.listeners.pop(request_id)(RequestOutput(request_id, finish_reason=FinishReason.ABORT))

    def health(self) -> EngineHealth:
        return EngineHealth(True)

    def stats(self) -> None:
        pass


async def test_all_requests_of_a_gateway_that_leaves_are_ended_also_those_that_end_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service import ray_engine

    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr(ray_engine.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(ray_engine, "freeze", lambda: None)  # This process goes on to other tests.
    engine, handlers = PreparingEngine(), list(logging.getLogger().handlers)
    replica = ray_engine.EngineReplica.__new__(ray_engine.EngineReplica)
    await replica.__init__(EngineConfig("m"), lambda *_: cast("ServedEngine", engine))  # type: ignore[misc]
    try:
        stream = await replica.open("gateway")
        assert isinstance(await anext(stream), Hello)
        calls = [await replica.open("gateway", make_request(f"r{n}", (1,), 5)) for n in range(3)]
        assert all([isinstance(await anext(call), Verdict) for call in calls])
        assert len(engine.listeners) == 3
        await stream.aclose()
        assert not engine.listeners
        async with asyncio.timeout(60):
            assert [item for call in calls async for item in call] == []
    finally:
        replica._pulse_task.cancel()
        logging.getLogger().handlers[:] = handlers
