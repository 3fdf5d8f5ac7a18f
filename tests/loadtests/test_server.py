"""Servers are started, waited for and ended, whatever they do."""

import os
import sys
from pathlib import Path
from time import perf_counter

import pytest

from loadtests.errors import ServerError
from loadtests.procfs import read_process
from loadtests.server import ManagedServer, ServerCommand

SCRIPTED = f"{sys.executable} -m tests.loadtests.scripted_server {{port}}"
STUBBORN = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "os.fork() or os.setsid() or time.sleep(60); time.sleep(60)"
)


def server(command: str, directory: Path) -> ManagedServer:
    return ManagedServer(ServerCommand("s", command), directory / "log")


async def test_a_server_is_started_and_stopped(tmp_path: Path) -> None:
    managed = server(SCRIPTED, tmp_path)
    try:
        assert 0 < await managed.start(20.0) < 20
        (pid,) = managed.roots()
        assert pid != os.getpid()
    finally:
        assert await managed.stop(10.0) == []
    assert managed.roots() == []


async def test_what_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    managed = server(f'{sys.executable} -c "{STUBBORN}" {{port}}', tmp_path)
    with pytest.raises(ServerError, match="not ready within 1 s"):
        await managed.start(1.0)
    pids = list(managed.roots())
    assert len(pids) == 2
    started_s = perf_counter()
    left = await managed.stop(0.3)
    assert len(left) == 2
    assert perf_counter() - started_s < 5
    for pid in pids:
        found = read_process(pid)
        assert found is None or found.group == 0 or (Path("/proc") / str(pid) / "cmdline").read_bytes() == b""


async def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    managed = server(f"{sys.executable} -c \"import sys; sys.exit('no such model')\" {{port}}", tmp_path)
    with pytest.raises(ServerError, match=r"(?s)ended with code 1.*no such model"):
        await managed.start(20.0)
    assert await managed.stop(1.0) == []


async def test_a_command_that_is_none(tmp_path: Path) -> None:
    managed = server("/no/such/program {port}", tmp_path)
    with pytest.raises(ServerError, match="No such file"):
        await managed.start(1.0)
    assert await managed.stop(1.0) == []


def test_a_command_is_told_its_port() -> None:
    assert ServerCommand("s", "serve --port {port} 'a b'").arguments(7) == ["serve", "--port", "7", "a b"]
    with pytest.raises(ServerError, match=r"no \{port\}"):
        ServerCommand("s", "serve")
