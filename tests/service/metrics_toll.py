"""What recording takes from a server's throughput: `python -m tests.service.metrics_toll`.

One server under constant load, in which recording is switched off and on in short turns (A B B A ...), so that both
meet the same machine. Tokens are those that the load client saw arrive in a turn, CPU time is all of the server's
threads. Recording takes less than what turns differ by for other reasons, so while it is on, all is recorded ten times
over (`--times`), and a tenth is told: the median over pairs of turns, with the range it lies in with a probability of
95 %. What happens every two seconds (a sample of the dashboard's history) or every five (a scrape, as in
`deploy/prometheus`) happens ten times as often.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import httpx

from loadtests.cell import CellResult, disturbances, failures
from loadtests.record import RequestRecord
from tests.service.loaded import add_load_options, loaded

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


async def take_turns(url: str, pid: int, seconds: float, turn_s: float, scrape_period_s: float) -> list[Turn]:
    """Switches recording in pairs of turns for so many `seconds`, the order within them changing from pair to pair."""
    turns, unscraped_s, until_s = list[Turn](), 0.0, perf_counter() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        while perf_counter() < until_s:
            for is_on in (False, True) if len(turns) % 4 else (True, False):
                os.kill(pid, signal.SIGUSR2 if is_on else signal.SIGUSR1)
                await asyncio.sleep(SETTLE_S)
                began_s, cpu_s = perf_counter(), cpu_seconds(pid)
                unscraped_s += turn_s if is_on else 0.0
                if is_on and unscraped_s >= scrape_period_s:
                    unscraped_s -= scrape_period_s
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


def rate_of(turn: Turn, sums: Sequence[tuple[float, float]]) -> Rate | None:
    """None where no token came: the machine stood still."""

    def until(at_s: float) -> float:
        index = bisect_left(sums, (at_s, 0.0))
        return sums[index - 1][1] if index else 0.0

    num_tokens = until(turn.ended_s) - until(turn.began_s)
    return Rate(num_tokens / (turn.ended_s - turn.began_s), turn.cpu_s / num_tokens) if num_tokens else None


def lost(ratios: Sequence[float], times: int) -> tuple[float, float, float]:
    """The median of ratios as a share above 1 for one of `times`, and between what it lies with 95 % probability."""
    ordered, middle = sorted((ratio - 1) / times for ratio in ratios), len(ratios) / 2
    low = ordered[max(math.floor(middle - math.sqrt(len(ratios))), 0)]
    high = ordered[min(math.ceil(middle + math.sqrt(len(ratios))), len(ratios) - 1)]
    return statistics.median(ordered), low, high


def told(shares: tuple[float, float, float], unit: float, name: str) -> str:
    """In `unit`s, the median and the range."""
    median, low, high = (share * unit for share in shares)
    return f"{median:.2f} {name} ({low:.2f} to {high:.2f})"


def report(turns: Sequence[Turn], result: CellResult, times: int, concurrency: int) -> str:
    sums = arrivals(result.measurement.records)
    rates = [(turn.is_on, rate_of(turn, sums)) for turn in turns]
    pairs = [
        {is_on: rate for is_on, rate in rates[first : first + 2] if rate is not None}
        for first in range(0, len(rates), 2)
    ]
    whole = [pair for pair in pairs if len(pair) == 2]
    if not whole:
        return "\n".join(["no token came", *failures([result])])
    lines = []
    for is_on, name in ((False, "off"), (True, f"on, {times} times")):
        tokens = statistics.median(pair[is_on].tokens_per_s for pair in whole)
        cpu = statistics.median(pair[is_on].cpu_per_token_s for pair in whole)
        lines.append(f"recording {name}: {tokens:.0f} tokens/s, {1e6 * cpu:.1f} us of CPU a token")
    token_us = 1e6 / statistics.median(pair[False].tokens_per_s for pair in whole)
    cpu_us = 1e6 * statistics.median(pair[False].cpu_per_token_s for pair in whole)
    throughput = lost([pair[False].tokens_per_s / pair[True].tokens_per_s for pair in whole], times)
    cpu_time = lost([pair[True].cpu_per_token_s / pair[False].cpu_per_token_s for pair in whole], times)
    lines.append(f"over {len(whole)} pairs of turns, {len(pairs) - len(whole)} left out, recording once takes")
    for shares, us, what in ((throughput, token_us, "throughput"), (cpu_time, cpu_us, "CPU time")):
        lines.append(
            f"  of {what} {told(shares, 100, '%')}: {told(shares, us, 'us a token')}, "
            f"{told(shares, us * concurrency, f'us a step of {concurrency}')}"
        )
    return "\n".join([*lines, *failures([result]), *disturbances([result])])


async def measure(options: argparse.Namespace) -> str:
    module, scrape_period_s = f"tests.service.unmetered {options.times}", SCRAPE_PERIOD_S / options.times
    async with loaded(module, options, options.seconds) as server:
        turns = await take_turns(server.url, server.pid, options.seconds, options.turn, scrape_period_s)
        result = await server.load
    return report(turns, result, options.times, options.concurrency)


def main() -> None:
    parser = argparse.ArgumentParser(description="What recording metrics takes from a server's throughput.")
    parser.add_argument("--seconds", type=float, default=150.0, help="of all turns together")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of one turn")
    parser.add_argument("--times", type=int, default=10, help="how often all is recorded while recording is on")
    add_load_options(parser)
    print(asyncio.run(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
