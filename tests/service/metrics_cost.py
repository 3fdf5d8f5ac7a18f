"""What each recording takes in a server under load, in microseconds: `python -m tests.service.metrics_cost`.

Each call is clocked where it is made, between steps of the network, which empty the processor's caches: in a loop of
its own it would take half of that. A median, so that waiting for other threads is not told as recording. The sum is
what recording takes if all else waits for it; `metrics_toll` measures what throughput loses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Mapping
from time import perf_counter
from timeit import repeat

import httpx

from tests.service.loaded import add_load_options, loaded

SCRAPE_PERIOD_S = 5.0
# What `unmetered` leaves on. Of a step: when it began, was planned and was executed. Of a token: when it came, which
# phases and logs are told by, too; and whether it is a prompt's.
CLOCKS_A_STEP, CLOCKS_A_TOKEN = 3, 1
KINDS_A_TOKEN = 1


def loop_us(statement: str, setup: str) -> float:
    """What cannot be clocked where it is made."""
    return min(repeat(statement, setup, number=100_000)) * 10


def table(found: Mapping[str, tuple[int, float]], seconds: float) -> str:
    """A row for each recording, of so many `seconds`."""
    num_steps, num_tokens = found["a step, noted"][0], found["a gap between tokens"][0]
    clock_us = loop_us("perf_counter()", "from time import perf_counter")
    kind_us = loop_us("start < request.num", "from types import SimpleNamespace as S; start, request = 40, S(num=32)")
    rows = {
        **found,
        "the clock, read": (CLOCKS_A_STEP * num_steps + CLOCKS_A_TOKEN * num_tokens, clock_us),
        "a prompt's token told from another": (KINDS_A_TOKEN * num_tokens, kind_us),
    }
    lines = ["| recording | a second | us each | us a step |", "| --- | --- | --- | --- |"]
    total_us = 0.0
    for name, (num_calls, median_us) in rows.items():
        step_us = num_calls * median_us / num_steps
        total_us += step_us
        lines.append(f"| {name} | {num_calls / seconds:.1f} | {median_us:.2f} | {step_us:.2f} |")
    share = total_us * num_steps / seconds / 1e6
    lines.append(f"| all | | | {total_us:.2f}, {100 * share:.2f} % of the time |")
    lines.append(f"{num_steps / seconds:.0f} steps and {num_tokens / seconds:.0f} tokens a second")
    return "\n".join(lines)


async def measure(options: argparse.Namespace) -> str:
    async with loaded("tests.service.clocked", options, options.seconds) as server:
        os.kill(server.pid, signal.SIGUSR1)
        began_s = perf_counter()
        async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
            while perf_counter() - began_s < options.seconds:
                await asyncio.sleep(SCRAPE_PERIOD_S)
                (await client.get("/metrics")).raise_for_status()
        seconds = perf_counter() - began_s
        os.kill(server.pid, signal.SIGUSR2)
        await server.load
        [line] = [line for line in server.log.read_text().splitlines() if line.startswith('{"a step')]
    return table(json.loads(line), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each recording takes in a server under load.")
    parser.add_argument("--seconds", type=float, default=60.0)
    add_load_options(parser)
    print(asyncio.run(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
