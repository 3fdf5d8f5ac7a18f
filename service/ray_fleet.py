"""How many engine replicas there are and should be, as Serve's controller knows it, and whether none is on purpose."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import cast

from ray import serve

from service.engine.stats import Fleet

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 1.0
_RUNNING = "RUNNING"
# One that is to move, or that stops, has a successor where there should be one.
_WANTED = ("STARTING", "UPDATING", "RECOVERING", _RUNNING)


class FleetWatch:
    """What was last heard of the replicas of one deployment, and when the first of them was woken, if it was."""

    def __init__(self, app_name: str, deployment_name: str, wake_timeout_s: float) -> None:
        self._app_name = app_name
        self._deployment_name = deployment_name
        self._wake_timeout_s = wake_timeout_s
        self._woken_s: float | None = None
        self._asking: asyncio.Future[Fleet | None] | None = None
        self.fleet: Fleet | None = None

    @property
    def is_asleep(self) -> bool:
        """Where no replica can be reached: because nothing was asked for, or the first one is on its way."""
        return self._is_waking or (self.fleet is not None and self.fleet.num_wanted == 0)

    async def look(self) -> None:
        """Asks the controller. Where that is away or does not answer within a second, what was known stays."""
        # A question to a process that is stopped waits in its thread, so that there must not be many of them.
        if self._asking is None:
            self._asking = asyncio.ensure_future(asyncio.to_thread(_ask, self._app_name, self._deployment_name))
            self._asking.add_done_callback(self._hear)
        await asyncio.wait({self._asking}, timeout=_ANSWER_TIMEOUT_S)

    def _hear(self, answer: asyncio.Future[Fleet | None]) -> None:
        self._asking = None
        if answer.cancelled():
            return
        if error := answer.exception():
            logger.debug("cannot ask how many engine replicas there should be: %s", error)
        else:
            self.fleet = answer.result()

    def wake(self) -> float:
        """A request goes where there is no replica yet, which makes Serve start one: how long to wait for it."""
        now_s = time.monotonic()
        if self._woken_s is None or not self._is_waking:
            self._woken_s = now_s
            logger.info("no engine replica runs; a request starts one")
        return self._woken_s + self._wake_timeout_s - now_s

    def is_up(self) -> None:
        """A replica is there."""
        self._woken_s = None

    @property
    def _is_waking(self) -> bool:
        return self._woken_s is not None and time.monotonic() < self._woken_s + self._wake_timeout_s


def _ask(app_name: str, deployment_name: str) -> Fleet | None:
    app = serve.status().applications.get(app_name)
    deployment = app.deployments.get(deployment_name) if app else None
    if deployment is None:
        return None
    counts = cast(Mapping[str, int], deployment.replica_states)  # which is what the names of states come as
    return Fleet(sum(counts.get(state, 0) for state in _WANTED), counts.get(_RUNNING, 0))
