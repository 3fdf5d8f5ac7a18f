"""Asking every replica of a deployment at once, and making do with those that answer in time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle


@dataclass(frozen=True, slots=True)
class Answers:
    """What replicas said, in no order; `num_silent` others should have."""

    told: list[Any]
    num_silent: int


async def ask_all(handle: DeploymentHandle[Any], method: str, *arguments: object, timeout_s: float = 1.0) -> Answers:
    """Calls `method` of every replica that takes requests.

    Raises DeploymentUnavailableError where there is none, and TimeoutError where Serve does not even send in time.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    async with asyncio.timeout_at(deadline_s):
        # Serve's own `results_async` gives up all answers for the sake of one that is late.
        calls = await handle.broadcast(method, *arguments)._fetch_replica_results_async()
    tasks = [asyncio.ensure_future(call.get_async()) for call in calls]  # type: ignore[no-untyped-call]
    try:
        await asyncio.wait(tasks, timeout=max(deadline_s - loop.time(), 0))
    finally:
        for task in tasks:
            task.cancel()
    told = [task.result() for task in tasks if task.done() and not task.cancelled() and task.exception() is None]
    return Answers(told, len(tasks) - len(told))
