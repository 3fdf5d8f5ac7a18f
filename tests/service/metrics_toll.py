"""What recording takes from a server's throughput: `python -m tests.service.metrics_toll`.

One server under constant load, in which recording is switched off and on in short turns (A B B A ...), so that both
meet the same machine. Tokens are those that the load client saw arrive in a turn, CPU time is all of the server's
threads. Recording takes less than what turns differ by for other reasons, so while it is on, all is recorded ten times
over (`--times`), scrapes included, one every five seconds as in `deploy/prometheus`, and a tenth is told: the median
over pairs of turns, with the range it lies in with a probability of 95 %.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import statistics
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import httpx

from loadtests.bench import served_model
from loadtests.cell import CellPlan, CellResult, ServerUnderTest, disturbances, failures, run_cell
from loadtests.plan import LoadPlan
from loadtests.record import RequestRecord
from loadtests.server import ManagedServer, ServerCommand
from loadtests.workload import Workload

COMMAND = f"{sys.executable} -m tests.service.unmetered {{times}} serve --local --log-level warning --port {{{{port}}}}"
# Of each turn's beginning, not counted: what is on its way then belongs to the turn before.
SETTLE_S = 0.1
SCRAPE_PERIOD_S = 5.0


@dataclass(frozen=True)
class Turn:
    """A time in which recording was on or off: from when to when (`perf_counter`), and the server's CPU seconds."""

    is_on: bool
    began_s: float
    ended_s: float
    cpu_s: float


@dataclass(frozen=True)
class Rate:
    """What a turn came to."""

    tokens_per_s: float
    cpu_per_token_s: float


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def take_turns(url: str, pid: int, num_pairs: int, turn_s: float, scrape_period_s: float) -> list[Turn]:
    """Switches recording for `num_pairs` pairs of turns, the order within a pair changing from pair to pair."""
    turns, unscraped_s = list[Turn](), 0.0
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        for pair in range(num_pairs):
            for is_on in (False, True) if pair % 2 else (True, False):
                os.kill(pid, signal.SIGUSR2 if is_on else signal.SIGUSR1)
                await asyncio.sleep(SETTLE_S)
                began_s, cpu_s = perf_counter(), cpu_seconds(pid)
                unscraped_s += turn_s if is_on else 0.0
                if is_on and unscraped_s >= scrape_period_s:
                    unscraped_s = 0.0
                    (await client.get("/metrics")).raise_for_status()
                await asyncio.sleep(max(began_s + turn_s - perf_counter(), 0))
                turns.append(Turn(is_on, began_s, perf_counter(), cpu_seconds(pid) - cpu_s))
    return turns


def arrivals(records: Sequence[RequestRecord]) -> list[tuple[float, float]]:
    """When so many tokens had come in all, in the order of time."""
    events: list[tuple[float, float]] = []
    for record in (record for record in records if record.times_s):
        counts = record.token_counts or [record.output_tokens / len(record.times_s)] * len(record.times_s)
        events += zip(record.times_s, counts, strict=True)
    total, sums = 0.0, []
    for at_s, count in sorted(events):
        total += count
        sums.append((at_s, total))
    return sums


def rate_of(turn: Turn, sums: Sequence[tuple[float, float]]) -> Rate:
    def until(at_s: float) -> float:
        index = bisect_left(sums, (at_s, 0.0))
        return sums[index - 1][1] if index else 0.0

    num_tokens = until(turn.ended_s) - until(turn.began_s)
    return Rate(num_tokens / (turn.ended_s - turn.began_s), turn.cpu_s / num_tokens)


def lost(ratios: Sequence[float], times: int) -> str:
    """The median of ratios, in per cent above 1 for one of `times`, and where it lies with a probability of 95 %."""
    ordered, middle = sorted(100 * (ratio - 1) / times for ratio in ratios), len(ratios) / 2
    low = ordered[max(math.floor(middle - math.sqrt(len(ratios))), 0)]
    high = ordered[min(math.ceil(middle + math.sqrt(len(ratios))), len(ratios) - 1)]
    return f"{statistics.median(ordered):.2f} % ({low:.2f} to {high:.2f})"


def report(turns: Sequence[Turn], result: CellResult, times: int) -> str:
    sums = arrivals(result.measurement.records)
    if not sums:
        return "\n".join(["no token came", *failures([result])])
    rates = [(turn.is_on, rate_of(turn, sums)) for turn in turns]
    pairs = [dict(rates[first : first + 2]) for first in range(0, len(rates), 2)]
    lines = []
    for is_on, name in ((False, "off"), (True, f"on, {times} times")):
        tokens = statistics.median(pair[is_on].tokens_per_s for pair in pairs)
        cpu = statistics.median(pair[is_on].cpu_per_token_s for pair in pairs)
        lines.append(f"recording {name}: {tokens:.0f} tokens/s, {1e6 * cpu:.1f} us of CPU a token")
    throughput = lost([pair[False].tokens_per_s / pair[True].tokens_per_s for pair in pairs], times)
    cpu_time = lost([pair[True].cpu_per_token_s / pair[False].cpu_per_token_s for pair in pairs], times)
    lines.append(
        f"over {len(pairs)} pairs of turns recording once takes {throughput} of throughput, {cpu_time} of CPU time"
    )
    return "\n".join([*lines, *failures([result]), *disturbances([result])])


async def measure(options: argparse.Namespace) -> str:
    num_pairs = max(round(options.seconds / 2 / (options.turn + SETTLE_S)), 2)
    duration_s = 2 * num_pairs * (options.turn + SETTLE_S) + 3
    load = LoadPlan(concurrency=options.concurrency, duration_s=duration_s, num_warmup=2 * options.concurrency)
    workload = Workload(prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens)
    with tempfile.TemporaryDirectory() as directory:
        managed = ManagedServer(ServerCommand("tessera", COMMAND.format(times=options.times)), Path(directory) / "log")
        try:
            await managed.start(60)
            [pid] = managed.roots()
            server = ServerUnderTest("tessera", managed.target, managed.roots)
            model = await served_model(server)
            cell = asyncio.create_task(run_cell(server, CellPlan(replace(workload, model=model), load)))
            await asyncio.sleep(2)
            url = f"http://127.0.0.1:{managed.target.port}"
            turns = await take_turns(url, pid, num_pairs, options.turn, SCRAPE_PERIOD_S / options.times)
            result = await cell
        finally:
            await managed.stop(10)
    return report(turns, result, options.times)


def main() -> None:
    parser = argparse.ArgumentParser(description="What recording metrics takes from a server's throughput.")
    parser.add_argument("--seconds", type=float, default=150.0, help="of all turns together")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of one turn")
    parser.add_argument("--times", type=int, default=10, help="how often all is recorded while recording is on")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    print(asyncio.run(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
