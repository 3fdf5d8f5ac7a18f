"""Whether anything but the server and this client used the machine while a cell was measured, and the verdict on it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from time import perf_counter
from typing import Any

from loadtests.procfs import CpuTimes, ProcessTimes, descendants, read_cpu_times, read_process, read_processes

SAMPLE_PERIOD_S = 1.0
MIN_WINDOW_S = 1.0
"""In less than that, ticks of 10 ms are too coarse to tell a quiet machine from a busy one."""


class Verdict(StrEnum):
    """What a result may be called."""

    CLEAN = "clean"
    DISTURBED = "disturbed"
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True)
class Limits:
    """In cores, averaged over the window; `peak_other` over the worst second."""

    other: float = 0.10
    peak_other: float = 0.50
    steal: float = 0.05
    client: float = 0.80


@dataclass(frozen=True, slots=True)
class Load:
    """Who used how many cores in a window. None where it could not be told."""

    window_s: float
    busy: float
    interrupts: float
    steal: float
    client: float
    server: float | None
    other: float | None
    peak_other: float | None
    top_others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Disturbance:
    """A verdict with its reasons and the measurement behind it."""

    verdict: Verdict
    reasons: tuple[str, ...]
    load: Load | None
    limits: Limits = field(default_factory=Limits)

    def described(self) -> dict[str, Any]:
        return asdict(self)


def judge(load: Load | None, limits: Limits) -> Disturbance:
    """Clean is what was seen to be quiet, and nothing else is."""
    if load is None:
        return Disturbance(Verdict.UNVERIFIED, ("the load of other processes was not measured",), None, limits)
    unknown = _unknown(load)
    excess = [
        f"{what} {used:.2f} cores (limit {limit:.2f})"
        for what, used, limit in (
            (f"other processes used{_names(load)}", load.other, limits.other),
            ("other processes used, in the worst second,", load.peak_other, limits.peak_other),
            ("the hypervisor took", load.steal, limits.steal),
            ("the load client itself used", load.client, limits.client),
        )
        if used is not None and used > limit
    ]
    verdict = Verdict.DISTURBED if excess else Verdict.UNVERIFIED if unknown else Verdict.CLEAN
    return Disturbance(verdict, (*excess, *unknown), load, limits)


def _unknown(load: Load) -> list[str]:
    if load.window_s < MIN_WINDOW_S:
        return [f"{load.window_s:.2f} s are too short to tell"]
    return [] if load.server is not None else ["the server's processes were not found; give --server-pid"]


def _names(load: Load) -> str:
    names = ", ".join(f"{name} {cores:.2f}" for name, cores in load.top_others[:3])
    return f" ({names})" if names else ""


@dataclass(frozen=True)
class _Snapshot:
    time_s: float
    cpu: CpuTimes
    processes: dict[int, ProcessTimes]
    server: set[int]


class Watch:
    """Accounts for the cores between `open` and `close`, and once a second between them.

    `server_roots` names the pids at the top of the server's process tree, or nothing where they are not known.
    Processor time of server processes that end in between is in their parent's account, so only orphans are lost.
    """

    def __init__(self, server_roots: Callable[[], Iterable[int]]) -> None:
        self._server_roots = server_roots
        self._opened: _Snapshot | None = None
        self._closed: _Snapshot | None = None
        self._peak_other: float | None = None
        self._sampler: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Starts the account. Call from a running event loop."""
        self._opened = self._snapshot()
        self._sampler = asyncio.get_running_loop().create_task(self._sample(self._opened))

    def close(self) -> None:
        self._closed = self._snapshot()
        if self._sampler is not None:
            self._sampler.cancel()

    def load(self) -> Load | None:
        """None if the window was never opened and closed."""
        if self._opened is None or self._closed is None:
            return None
        before, after = self._opened, self._closed
        window_s = max(after.time_s - before.time_s, 1e-9)
        cpu = after.cpu - before.cpu
        mine = _used_s({os.getpid()}, before, after)
        servers = (before.server | after.server) - {os.getpid()}
        server = _used_s(servers, before, after) if servers else None
        other = None if server is None else max(0.0, cpu.busy_s - mine - server)
        return Load(
            window_s=window_s,
            busy=cpu.busy_s / window_s,
            interrupts=cpu.interrupt_s / window_s,
            steal=cpu.steal_s / window_s,
            client=mine / window_s,
            server=None if server is None else server / window_s,
            other=None if other is None else other / window_s,
            peak_other=self._peak_other,
            top_others=_top_others(servers | {os.getpid()}, before, after),
        )

    def _snapshot(self) -> _Snapshot:
        processes = read_processes()
        server = descendants(self._server_roots(), processes)
        return _Snapshot(perf_counter(), read_cpu_times(), processes, server)

    async def _sample(self, opened: _Snapshot) -> None:
        """The worst second. Looks at the processes known from the start only: reading all of /proc costs too much."""
        known = opened.server | {os.getpid()}
        last_s, last_other_s = opened.time_s, _other_s(opened.cpu, opened.processes, known)
        while opened.server:
            await asyncio.sleep(SAMPLE_PERIOD_S)
            now = {pid: process for pid in known if (process := read_process(pid)) is not None}
            if now.keys() != known:
                return  # a server process ended, and where its account went is not known
            now_s, other_s = perf_counter(), _other_s(read_cpu_times(), now, known)
            cores = max(0.0, other_s - last_other_s) / (now_s - last_s)
            self._peak_other = cores if self._peak_other is None else max(self._peak_other, cores)
            last_s, last_other_s = now_s, other_s


async def wait_until_quiet(server_roots: Callable[[], Iterable[int]], limits: Limits, timeout_s: float) -> bool:
    """Returns True once a second passed in which others kept to `limits`, False after `timeout_s` without one."""
    deadline_s = perf_counter() + timeout_s
    while perf_counter() < deadline_s:
        watch = Watch(server_roots)
        watch.open()
        await asyncio.sleep(SAMPLE_PERIOD_S)
        watch.close()
        if judge(watch.load(), limits).verdict is not Verdict.DISTURBED:
            return True
    return False


def _other_s(cpu: CpuTimes, processes: dict[int, ProcessTimes], known: set[int]) -> float:
    return cpu.busy_s - sum(processes[pid].own_s + processes[pid].reaped_s for pid in known)


def _used_s(pids: set[int], before: _Snapshot, after: _Snapshot) -> float:
    """Seconds that `pids` used in between, with the children they reaped; one born in between counts from zero."""
    used = 0.0
    for pid in pids & after.processes.keys():
        used += _account_s(after.processes[pid]) - _earlier_s(after.processes[pid], before)
    ended = (pids & before.processes.keys()) - after.processes.keys()
    return used - sum(_account_s(before.processes[pid]) for pid in ended if before.processes[pid].parent in pids)


def _account_s(process: ProcessTimes) -> float:
    return process.own_s + process.reaped_s


def _earlier_s(process: ProcessTimes, before: _Snapshot) -> float:
    earlier = before.processes.get(process.pid)
    return _account_s(earlier) if earlier is not None and earlier.birth == process.birth else 0.0


def _top_others(ours: set[int], before: _Snapshot, after: _Snapshot) -> tuple[tuple[str, float], ...]:
    """The other processes that used most, as (name, cores)."""
    window_s = max(after.time_s - before.time_s, 1e-9)
    used: dict[str, float] = {}
    for pid in after.processes.keys() - ours:
        process = after.processes[pid]
        earlier = before.processes.get(pid)
        own_s = process.own_s - (earlier.own_s if earlier is not None and earlier.birth == process.birth else 0.0)
        used[process.name] = used.get(process.name, 0.0) + own_s / window_s
    ranked = sorted(used.items(), key=lambda entry: -entry[1])
    return tuple((name, round(cores, 3)) for name, cores in ranked[:5] if cores >= 0.005)
