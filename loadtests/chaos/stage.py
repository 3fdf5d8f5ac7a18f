"""A server under test and its processes: who they are, whether all are there, and how they are broken."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from time import perf_counter

from loadtests.client import CompletionClient
from loadtests.errors import ServerError
from loadtests.exposition import gauge_sum, num_series
from loadtests.http1 import MalformedResponse
from loadtests.procfs import read_title
from loadtests.server import ManagedServer

POLL_S = 0.1
_REPLICA = "ray::ServeReplica:"
_CONTROLLER = "ray::ServeController"


class Stage:
    """`num_replicas` engines behind one gateway. Raises ServerError where the server does not become whole in time.

    Files put into `orders` tell its engines to break, and the server to change: see `order`.
    """

    def __init__(self, server: ManagedServer, client: CompletionClient, orders: Path, num_replicas: int) -> None:
        self.client = client
        self.num_replicas = num_replicas
        self._server = server
        self._orders = orders
        self._gone: set[int] = set()

    def engines(self) -> list[int]:
        """Processes of engine replicas but those given up, the oldest first."""
        return [pid for pid in self._titled(_REPLICA) if pid not in self._gone]

    def controller(self) -> int:
        """The process of Ray Serve's controller."""
        pids = [pid for pid in self._titled(_CONTROLLER) if pid not in self._gone]
        if not pids:
            raise ServerError("there is no Serve controller")
        return pids[0]

    def signal(self, pid: int, number: signal.Signals) -> None:
        os.kill(pid, number)

    def give_up(self, *pids: int) -> None:
        """These are to be replaced: the server is not whole with them."""
        self._gone.update(pids)

    def order(self, what: str) -> None:
        """`raise-PID`, `hang-PID`: that engine's next step. `replicas-N`: deploys anew, with so many."""
        (self._orders / what).touch()

    async def is_whole(self) -> bool:
        """Whether the gateway is ready and has as many engines as it should, none of them given up."""
        if len(self.engines()) != self.num_replicas:
            return False
        try:
            ready, _ = await self.client.get_json("/readyz")
            text = (await self.client.get("/metrics")).body.decode()
        except (OSError, MalformedResponse, TimeoutError):
            return False
        return ready == 200 and num_series(text, "mosaic_num_requests_running") == self.num_replicas

    async def until_whole(self, timeout_s: float) -> float:
        """Seconds until the server is whole."""
        started_s = perf_counter()
        while not await self.is_whole():
            if perf_counter() - started_s > timeout_s:
                raise ServerError(f"not whole again within {timeout_s:g} s: engines {self.engines()}")
            await asyncio.sleep(POLL_S)
        return perf_counter() - started_s

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

    def _titled(self, title: str) -> list[int]:
        return sorted(pid for pid in self._server.roots() if read_title(pid).startswith(title))
