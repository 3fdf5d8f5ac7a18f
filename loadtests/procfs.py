"""Who used the processor, read from /proc. Linux only; a process that vanishes while being read is simply not there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LISTEN = "0A"
_PSS = ("Pss_Anon:", "Pss_Shmem:")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of processor time since boot, summed over the cores this process may use."""

    busy_s: float
    """Processes and kernel threads: user, nice and system."""
    interrupt_s: float
    steal_s: float

    def __sub__(self, other: CpuTimes) -> CpuTimes:
        return CpuTimes(self.busy_s - other.busy_s, self.interrupt_s - other.interrupt_s, self.steal_s - other.steal_s)


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """One process: its name, parent, and processor seconds. `birth` tells a reused pid from the first of its name."""

    pid: int
    name: str
    parent: int
    group: int
    birth: int
    own_s: float
    reaped_s: float
    """Of children that ended and were waited for."""


def read_cpu_times(proc: Path = Path("/proc")) -> CpuTimes:
    """Sums the cores of this process's affinity: /proc/stat has those of the host."""
    cores = {f"cpu{core}" for core in usable_cores()}
    busy = interrupt = steal = 0
    for line in (proc / "stat").read_text().splitlines():
        name, *values = line.split()
        if name in cores:
            user, nice, system, _idle, _iowait, irq, softirq, stolen = (int(value) for value in values[:8])
            busy += user + nice + system
            interrupt += irq + softirq
            steal += stolen
    return CpuTimes(busy / TICKS_PER_S, interrupt / TICKS_PER_S, steal / TICKS_PER_S)


def usable_cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def read_process(pid: int, proc: Path = Path("/proc")) -> ProcessTimes | None:
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()  # from field 3 of proc_pid_stat(5) on
    user, system, reaped_user, reaped_system = (int(field) / TICKS_PER_S for field in fields[11:15])
    return ProcessTimes(
        pid, name, int(fields[1]), int(fields[2]), int(fields[19]), user + system, reaped_user + reaped_system
    )


def read_title(pid: int, proc: Path = Path("/proc")) -> str:
    """The command line of a process, which it may have changed itself; empty for one that has ended."""
    try:
        return (proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def read_processes(proc: Path = Path("/proc")) -> dict[int, ProcessTimes]:
    found = (read_process(int(entry.name), proc) for entry in proc.iterdir() if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None}


def read_pss_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Memory of a process that no file backs, in which a page shared by n counts as 1/n; 0 for one that is gone.

    Pages of files do not count: what is this process's share of them changes with who else runs.
    """
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(_PSS))


def descendants(roots: Iterable[int], processes: Mapping[int, ProcessTimes]) -> set[int]:
    """The pids of `roots` that live, and of everything below them."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    waiting = [pid for pid in roots if pid in processes]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def listener_pids(port: int, proc: Path = Path("/proc")) -> set[int]:
    """The processes that listen on TCP `port`, as far as this user may see."""
    inodes = {
        f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listening_inodes(proc / "net" / table, port)
    }
    return {int(entry.name) for entry in proc.iterdir() if entry.name.isdigit() and _holds(entry / "fd", inodes)}


def _listening_inodes(table: Path, port: int) -> list[str]:
    if not table.exists():
        return []
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return [row[9] for row in rows if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port]


def _holds(descriptors: Path, links: set[str]) -> bool:
    try:
        return any(str(entry.readlink()) in links for entry in descriptors.iterdir())
    except OSError:
        return False
