"""A server started for a test: its command, its process tree, its log, and an end to all of it in bounded time."""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from loadtests.client import CompletionClient
from loadtests.errors import ServerError
from loadtests.http1 import MalformedResponse
from loadtests.procfs import descendants, read_process, read_processes
from loadtests.target import Target

READY_PATHS = ("/readyz", "/health")
"""Asked in this order until one is not 404."""
POLL_S = 0.1
PROBE_TIMEOUT_S = 5.0
KILL_WAIT_S = 5.0
_NEVER_GIVEN = (20_000, 32_768)
"""Ports below those for outgoing connections, by Linux's default, and above those of Ray's workers."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a server. No shell runs it; `{port}` in it becomes the port."""

    name: str
    command: str

    def __post_init__(self) -> None:
        if "{port}" not in self.command:
            raise ServerError(f"{self.name}: no {{port}} in {self.command!r}; the server is told its port there")

    def arguments(self, port: int) -> list[str]:
        return shlex.split(self.command.replace("{port}", str(port)))


class ManagedServer:
    """One running server. `start` and `stop` are called once each; `stop` may be called whatever became of `start`."""

    def __init__(self, command: ServerCommand, log: Path) -> None:
        self.name = command.name
        self.target = Target("127.0.0.1", "127.0.0.1", free_port())
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._births: dict[int, int] = {}

    async def start(self, timeout_s: float) -> float:
        """Starts the server and returns the seconds until it was ready. Raises ServerError with the end of its log."""
        started_s = perf_counter()
        self._process = self._spawn()
        while perf_counter() - started_s < timeout_s:
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} ended with code {self._process.returncode}{self._log_end()}")
            if await self._is_ready():
                return perf_counter() - started_s
            await asyncio.sleep(POLL_S)
        raise ServerError(f"{self.name} was not ready within {timeout_s:g} s{self._log_end()}")

    def roots(self) -> Iterable[int]:
        """Every process of the server ever seen that still lives: also those whose parent has ended."""
        if self._process is None:
            return ()
        processes = read_processes()
        known = {pid for pid, birth in self._births.items() if pid in processes and processes[pid].birth == birth}
        for pid in descendants({self._process.pid, *known}, processes):
            self._births[pid] = processes[pid].birth
        return [pid for pid in self._births if pid in processes and processes[pid].birth == self._births[pid]]

    async def stop(self, timeout_s: float) -> list[str]:
        """Asks the server to end, and ends what is left of it after `timeout_s`. Returns the names of what was left."""
        if self._process is None:
            return []
        self.roots()
        if self._is_running():
            self._process.send_signal(signal.SIGTERM)
        await self._wait_for_end(timeout_s)
        left = [(process.pid, process.name) for process in map(read_process, self._alive()) if process is not None]
        for pid, _ in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._wait_for_end(KILL_WAIT_S)
        return [name for _, name in left]

    async def _wait_for_end(self, timeout_s: float) -> None:
        deadline_s = perf_counter() + timeout_s
        while (self._alive() or self._is_running()) and perf_counter() < deadline_s:  # noqa: ASYNC110 - processes set no event
            await asyncio.sleep(POLL_S)

    def _alive(self) -> list[int]:
        """Pids of the server that live; a zombie has ended, whoever is to reap it."""
        return [pid for pid in self.roots() if not _is_zombie(pid)]

    def _is_running(self) -> bool:
        """Of the first process alone; reaps it once it has ended."""
        return self._process is not None and self._process.poll() is None

    def _spawn(self) -> subprocess.Popen[bytes]:
        arguments = self._command.arguments(self.target.port)
        with self._log.open("wb") as log:
            try:
                return subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                raise ServerError(f"{self.name}: {arguments[0]}: {error.strerror}") from error

    async def _is_ready(self) -> bool:
        client = CompletionClient(self.target, timeout_s=PROBE_TIMEOUT_S)
        try:
            for path in READY_PATHS:
                status, _ = await client.get_json(path)
                if status != 404:
                    return status == 200
        except (OSError, MalformedResponse):
            return False
        finally:
            client.close()
        return False

    def _log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-15:]
        return f"; its log ends:\n{os.linesep.join(lines)}" if lines else f"; its log {self._log} is empty"


def free_port() -> int:
    """A TCP port that nothing listens on now, of those that the system gives to nobody by itself: one of the others may
    be taken, by any connection, before the server that is to have it has started.
    """
    while True:
        port = random.randrange(*_NEVER_GIVEN)
        with suppress(OSError), socket.create_server(("", port)):
            return port


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
