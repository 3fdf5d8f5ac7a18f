"""A server under test and its processes: who they are, whether all are there, and how they are broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from time import perf_counter

from loadtests.client import CompletionClient
from loadtests.errors import ServerError
from loadtests.exposition import gauge_sum, series_values
from loadtests.http1 import MalformedResponse
from loadtests.procfs import descendants, read_processes, read_title
from loadtests.server import ManagedServer

POLL_S = 0.1
# Requests come and go in tens of milliseconds to seconds: nothing is broken while an engine happens to have hardly any.
_NUM_BUSY = 4
_BUSY_TIMEOUT_S = 10.0
_ENGINE = re.compile(r"ray::ServeReplica:[^:]*:Engine\b")
_GATEWAY = re.compile(r"ray::ServeReplica:[^:]*:Gateway\b")
_CONTROLLER = re.compile(r"ray::ServeController\b")
_SECOND_NODE = re.compile(r"\S*/raylet (?!.*--head)")


class Stage:
    """`num_replicas` engines behind one gateway, or behind `num_gateways` in processes of their own.

    Raises ServerError where the server does not become whole in time.
    Files put into `orders` tell its engines to break, and the server to change: see `order`.
    """

    def __init__(
        self,
        server: ManagedServer,
        client: CompletionClient,
        orders: Path,
        num_replicas: int,
        num_gateways: int = 0,
    ) -> None:
        self.client = client
        self.num_replicas = num_replicas
        self._num_gateways = num_gateways
        self._server = server
        self._orders = orders
        self._gone: set[int] = set()

    def engines(self) -> list[int]:
        """Processes of engine replicas but those given up, the oldest first."""
        return self._titled(_ENGINE)

    def gateways(self) -> list[int]:
        """Processes of gateways but those given up, where they have some of their own."""
        return self._titled(_GATEWAY)

    def controller(self) -> int:
        """The process of Ray Serve's controller."""
        pids = self._titled(_CONTROLLER)
        if not pids:
            raise ServerError("there is no Serve controller")
        return pids[0]

    def second_node(self) -> list[int]:
        """Every process of the Ray node that is not the head, the one that starts the others first."""
        raylets = self._titled(_SECOND_NODE)
        if not raylets:
            raise ServerError("there is no second node")
        return [raylets[0], *sorted(descendants(raylets[:1], read_processes()) - set(raylets))]

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Sends it; a process that has just ended gets none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def give_up(self, *pids: int) -> None:
        """These are to be replaced: the server is not whole with them."""
        self._gone.update(pids)

    def order(self, what: str) -> None:
        """`raise-PID`, `hang-PID`: that engine's next step. `replicas-N`: deploys anew, with so many."""
        (self._orders / what).touch()

    async def is_whole(self) -> bool:
        """Whether a gateway is ready and has as many engines as it should, and all are there, none of them given up."""
        if len(self.engines()) != self.num_replicas or len(self.gateways()) != self._num_gateways:
            return False
        try:
            ready, _ = await self.client.get_json("/readyz")
            text = (await self.client.get("/metrics")).body.decode()
        except (OSError, MalformedResponse, TimeoutError):
            return False
        return ready == 200 and len(series_values(text, "mosaic_num_requests_running")) == self.num_replicas

    async def until_whole(self, timeout_s: float) -> float:
        """Seconds until the server is whole."""
        started_s = perf_counter()
        while not await self.is_whole():
            if perf_counter() - started_s > timeout_s:
                raise ServerError(f"not whole again within {timeout_s:g} s: {self._found()}")
            await asyncio.sleep(POLL_S)
        return perf_counter() - started_s

    async def until_busy(self) -> None:
        """Waits until every engine works on some requests at once, at two looks in a row, but not for ever.

        At the first look a gateway may not have heard yet that an engine took a request: it would send that elsewhere,
        not go on with it. The last thing before a blow: whom it hits is looked for before, since that takes as long as
        some requests do.
        """
        started_s, num_looks = perf_counter(), 0
        while num_looks < 2 and perf_counter() - started_s < _BUSY_TIMEOUT_S:
            text = (await self.client.get("/metrics")).body.decode()
            is_busy = min(series_values(text, "mosaic_num_requests_running"), default=0) >= _NUM_BUSY
            num_looks = num_looks + 1 if is_busy else 0

    async def until_idle(self, timeout_s: float) -> str:
        """Waits until no engine holds anything for anybody; what one still held after so long, else empty."""
        started_s = perf_counter()
        while True:
            text = (await self.client.get("/metrics")).body.decode()
            held = {
                "running": gauge_sum(text, "mosaic_num_requests_running"),
                "waiting": gauge_sum(text, "mosaic_num_requests_waiting"),
                "blocks": gauge_sum(text, "mosaic_memory_blocks", state="used"),
            }
            if not any(held.values()):
                return ""
            if perf_counter() - started_s > timeout_s:
                return ", ".join(f"{count:.0f} {name}" for name, count in held.items())
            await asyncio.sleep(POLL_S)

    async def count(self, name: str) -> float:
        """The sum of a metric's series."""
        return gauge_sum((await self.client.get("/metrics")).body.decode(), name)

    def _titled(self, title: re.Pattern[str]) -> list[int]:
        return sorted(pid for pid in self._server.roots() if pid not in self._gone and title.match(read_title(pid)))

    def _found(self) -> str:
        return f"engines {self.engines()}, gateways {self.gateways()}"
