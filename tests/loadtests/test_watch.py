"""A busy machine is called busy, by process and by verdict; what could not be seen is not called quiet."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from loadtests.procfs import descendants, listener_pids, read_cpu_times, read_process, read_processes, usable_cores
from loadtests.watch import Disturbance, Limits, Load, Verdict, Watch, judge, wait_until_quiet
from tests.loadtests.scripted_server import Script, serving

QUIET = Load(window_s=10, busy=1.5, interrupts=0.01, steal=0, client=0.1, server=1.4, other=0.0, peak_other=0.02)
SPIN = "while True: pass"
NAP = "import time; time.sleep(60)"


@contextmanager
def process(code: str) -> Generator[int]:
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()


def test_a_quiet_machine_is_clean() -> None:
    assert judge(QUIET, Limits()) == Disturbance(Verdict.CLEAN, (), QUIET, Limits())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"other": 0.2, "top_others": (("cc1plus", 0.2),)}, "cc1plus 0.20"),
        ({"peak_other": 0.9}, "worst second"),
        ({"steal": 0.3}, "hypervisor"),
        ({"client": 0.95}, "load client itself"),
    ],
)
def test_each_kind_of_disturbance(changes: dict[str, object], reason: str) -> None:
    disturbance = judge(replace(QUIET, **changes), Limits())  # type: ignore[arg-type]
    assert disturbance.verdict is Verdict.DISTURBED
    assert reason in disturbance.reasons[0]


def test_what_was_not_seen_is_not_clean() -> None:
    assert judge(None, Limits()).verdict is Verdict.UNVERIFIED
    unknown = replace(QUIET, server=None, other=None, peak_other=None)
    assert judge(unknown, Limits()).verdict is Verdict.UNVERIFIED
    assert judge(replace(QUIET, window_s=0.2), Limits()).verdict is Verdict.UNVERIFIED
    assert judge(replace(unknown, steal=0.5), Limits()).verdict is Verdict.DISTURBED


def used_s(pid: int) -> float:
    found = read_process(pid)
    assert found is not None
    return found.own_s


async def watch_for(seconds: float, server: int, busy: int) -> tuple[Load, float]:
    """What was seen, and the processor seconds that `busy` really used: on a shared machine that is not up to it."""
    watch = Watch(lambda: [server])
    before_s = used_s(busy)
    watch.open()
    await asyncio.sleep(seconds)
    watch.close()
    load = watch.load()
    assert load is not None
    return load, used_s(busy) - before_s


async def test_a_stranger_s_work_is_seen_and_named() -> None:
    with process(NAP) as server, process(SPIN) as stranger:
        load, spent_s = await watch_for(1.5, server, stranger)
    assert spent_s > 0.1
    assert load.other is not None
    assert load.other * load.window_s > spent_s - 0.2
    assert load.peak_other is not None
    assert load.server is not None
    assert load.server < 0.1
    assert any("python" in name for name, _ in load.top_others)
    assert judge(load, Limits(other=0.05)).verdict is Verdict.DISTURBED


async def test_a_child_s_work_is_the_server_s() -> None:
    with process(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])") as server:
        children = await children_of(server)
        try:
            load, spent_s = await watch_for(1.2, server, *children)
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
    assert spent_s > 0.1
    assert load.server is not None
    assert load.server * load.window_s == pytest.approx(spent_s, abs=0.1)


async def children_of(pid: int) -> list[int]:
    """Waits for the first."""
    while not (found := descendants([pid], read_processes()) - {pid}):
        await asyncio.sleep(0.02)
    return sorted(found)


async def test_children_that_come_and_go_are_the_server_s_work() -> None:
    code = "import subprocess, sys\nwhile True: subprocess.run([sys.executable, '-S', '-c', 'sum(range(2*10**6))'])"
    with process(code) as server:
        await asyncio.sleep(0.3)
        watch = Watch(lambda: [server])
        watch.open()
        await asyncio.sleep(1.5)
        watch.close()
    load = watch.load()
    assert load is not None
    assert load.server is not None
    assert load.server > 0.05


async def test_without_a_server_the_others_are_unknown() -> None:
    watch = Watch(lambda: [])
    watch.open()
    await asyncio.sleep(0.05)
    watch.close()
    load = watch.load()
    assert load is not None
    assert (load.server, load.other) == (None, None)


def test_a_watch_that_was_not_opened_saw_nothing() -> None:
    assert Watch(lambda: []).load() is None


async def test_waiting_for_quiet_ends() -> None:
    with process(NAP) as server:
        anything = Limits(other=99, peak_other=99, steal=99, client=99)
        assert await wait_until_quiet(lambda: [server], anything, 10.0)
        assert not await wait_until_quiet(lambda: [server], replace(anything, other=-1.0), 0.5)


async def test_the_listener_of_a_port_is_found() -> None:
    async with serving(Script()) as server:
        assert listener_pids(server.port) == {os.getpid()}
    assert listener_pids(server.port) == set()


def test_descendants_are_a_tree() -> None:
    with process(NAP) as child:
        processes = read_processes()
        assert {os.getpid(), child} <= descendants([os.getpid()], processes)
        assert descendants([child, 2**30], processes) == {child}
    assert read_process(2**30) is None


def test_only_usable_cores_are_summed(tmp_path: Path) -> None:
    cores = sorted(usable_cores())
    lines = ["cpu 9 9 9 9 9 9 9 9 0 0", f"cpu{max(cores) + 1} 9 9 9 9 9 9 9 9 0 0"]
    lines += [f"cpu{core} 100 200 300 9 9 10 20 5 0 0" for core in cores]
    (tmp_path / "stat").write_text("\n".join(lines))
    times = read_cpu_times(tmp_path)
    ticks = os.sysconf("SC_CLK_TCK")
    assert times.busy_s == pytest.approx(600 * len(cores) / ticks)
    assert times.interrupt_s == pytest.approx(30 * len(cores) / ticks)
    assert times.steal_s == pytest.approx(5 * len(cores) / ticks)


def test_a_name_with_brackets_and_spaces_is_read(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = " ".join(str(i) for i in range(4, 53))
    (tmp_path / "7" / "stat").write_text(f"7 (a b) c)) S {fields}")
    process_times = read_process(7, tmp_path)
    assert process_times is not None
    assert (process_times.name, process_times.parent, process_times.birth) == ("a b) c)", 4, 22)
    assert process_times.own_s == pytest.approx((14 + 15) / os.sysconf("SC_CLK_TCK"))
    assert process_times.reaped_s == pytest.approx((16 + 17) / os.sysconf("SC_CLK_TCK"))
