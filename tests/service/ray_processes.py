"""What a private Ray consists of, read from /proc: its processes, the ports they listen on, its directory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LISTENING = "0A"


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket. `address` is in hexadecimal, as the kernel writes it."""

    process: str
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return self.address in ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def run_directory(pid: int) -> Path | None:
    """The private directory of the launcher `pid`, found by the lock it holds; None before there is one."""
    for target in _open_files(pid):
        if target.endswith("/lock") and "/tessera-" in target:
            return Path(target).parent
    return None


def processes_of(directory: Path, *, but: int = 0) -> dict[int, str]:
    """Processes with files of the directory open, by id, and their titles."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        if pid != but and any(target.startswith(str(directory)) for target in _open_files(pid)):
            with contextlib.suppress(OSError):
                found[pid] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that the processes and their ended children have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def listeners(processes: dict[int, str]) -> list[Listener]:
    """The TCP sockets that these processes listen on."""
    owner = {}
    for pid, title in processes.items():
        owner |= {target[8:-1]: title for target in _open_files(pid) if target.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == _LISTENING and fields[9] in owner:
                found.add(Listener(owner[fields[9]], address, int(port, 16)))
    return sorted(found, key=lambda listener: listener.port)


def wait_until_gone(pids: Iterable[int], timeout_s: float) -> float:
    """Seconds until none of the processes runs any more. Raises AssertionError with those that do."""
    started_s = time.monotonic()
    while running := {pid: _state(pid) for pid in pids if _state(pid) not in ("", "Z", "X")}:
        assert time.monotonic() - started_s < timeout_s, running
        time.sleep(0.05)
    return time.monotonic() - started_s


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return ""


def _open_files(pid: int) -> list[str]:
    targets = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                targets.append(str(path.readlink()))
    return targets
