"""A gateway before an engine that really schedules, with a scripted network that counts for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import httpx

from service.engine.async_engine import AsyncEngine
from service.engine.engine import Engine
from service.engine.local_client import LocalEngineClient
from service.engine.scheduler import Scheduler
from service.engine.stats import EngineInfo
from service.engine.step import SchedulerOutput, StepOutput
from service.gateway.settings import GatewaySettings
from tests.engine.scripted import VOCAB_SIZE, ScriptedRunner, make_scheduler
from tests.gateway.server import GatewayServer, served_model

INFO = EngineInfo("", VOCAB_SIZE, 64, None, "float32", "float32", "cpu", "scripted", "scripted", 0, 16)


class CountingRunner(ScriptedRunner):
    """Counts for itself what it was given and what it gave; waits before the steps `halts` for `go_on`."""

    def __init__(self, on_step: Callable[[], None] = lambda: None, halts: Sequence[int] = ()) -> None:
        super().__init__(on_step=on_step)
        self.num_steps = self.num_absorbed = self.num_sampled = 0
        self._halts = list(halts)
        self._halted_at: int | None = None
        self._may_go_on = threading.Event()

    def is_halted_at(self, step: int) -> bool:
        """Whether it waits before this step: what the steps before it made has then been booked."""
        return self._halted_at == step

    def go_on(self) -> None:
        self._may_go_on.set()

    def execute(self, plan: SchedulerOutput, on_start: Callable[[], None] = lambda: None) -> StepOutput:
        on_start()
        if self.num_steps in self._halts:
            self._halted_at = self.num_steps
            assert self._may_go_on.wait(60)
            self._halted_at = None
            self._may_go_on.clear()
            self._halts.pop(0)
        result = super().execute(plan)
        self.num_steps += 1
        self.num_absorbed += sum(item.num_tokens for item in plan.scheduled)
        self.num_sampled += sum(token_id is not None for token_id in result.token_ids)
        return result


@contextmanager
def serving(runner: CountingRunner, settings: GatewaySettings | None = None, **sizes: int) -> Iterator[httpx.Client]:
    """A client of a server whose network is `runner`."""
    scripted = make_scheduler(max_model_len=64, **{"num_blocks": 64, "has_prefix_cache": False, **sizes})
    scheduler = Scheduler(scripted.config, scripted.blocks)  # on the clock of the world
    engine = AsyncEngine(Engine(scheduler, runner), INFO)

    async def start() -> None:
        engine.start()

    with GatewayServer(LocalEngineClient(engine), served_model(INFO), settings) as server:
        server.call(start())
        with httpx.Client(base_url=server.url, timeout=60) as client:
            try:
                yield client
            finally:
                runner.go_on()
                server.call(engine.close())
