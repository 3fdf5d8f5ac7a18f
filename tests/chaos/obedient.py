"""Engines of the product that break when a file says so, or when a prompt of a certain salt begins: for tests alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from loadtests.chaos.cases import POISON_SALT
from service.config import EngineConfig
from service.engine.async_engine import AsyncEngine
from service.engine.engine import Runner
from service.engine.step import SchedulerOutput, StepOutput
from service.ray_engine import ServedEngine, load_engine


class ObedientRunner:
    """A runner before whose steps the orders are read."""

    def __init__(self, runner: Runner, orders: Path) -> None:
        self._runner = runner
        self._raise = orders / f"raise-{os.getpid()}"
        self._hang = orders / f"hang-{os.getpid()}"

    def execute(self, plan: SchedulerOutput, on_start: Callable[[], None] = lambda: None) -> StepOutput:
        """See `Runner.execute`."""
        if self._raise.exists():
            raise RuntimeError("told to")
        if self._hang.exists():
            time.sleep(3600)
        if any(item.sequence.request.cache_salt == POISON_SALT for item in plan.scheduled):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._runner.execute(plan, on_start)


def load_obedient(config: EngineConfig, replica: str, orders: Path) -> ServedEngine:
    """The product's engine, with such a runner."""
    served = load_engine(config, replica)
    assert isinstance(served, AsyncEngine)
    engine = served._engine
    engine.runner = ObedientRunner(engine.runner, orders)
    return served
