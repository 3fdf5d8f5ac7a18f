"""A server of the shipped model under constant load, for measuring what a part of it takes."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loadtests.bench import served_model
from loadtests.cell import CellPlan, CellResult, ServerUnderTest, run_cell
from loadtests.plan import LoadPlan
from loadtests.server import ManagedServer, ServerCommand
from loadtests.workload import Workload

# After the first requests, before anything is measured.
SETTLE_S = 2.0
# In which what is measured must have ended; then there is no more load.
SLACK_S = 10.0


@dataclass(frozen=True, slots=True)
class LoadedServer:
    """`log` is where its output goes; `load` ends some time after what was measured."""

    pid: int
    url: str
    log: Path
    load: asyncio.Task[CellResult]


def add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)


@asynccontextmanager
async def loaded(module: str, options: argparse.Namespace, seconds: float) -> AsyncIterator[LoadedServer]:
    """Runs `python -m module serve ...` and puts load on it, for `seconds` and a little longer."""
    command = f"{sys.executable} -m {module} serve --local --log-level warning --port {{port}}"
    duration_s = SETTLE_S + seconds + SLACK_S
    plan = LoadPlan(concurrency=options.concurrency, duration_s=duration_s, num_warmup=2 * options.concurrency)
    workload = Workload(prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens)
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        managed = ManagedServer(ServerCommand("tessera", command), log)
        try:
            await managed.start(60)
            [pid] = managed.roots()
            server = ServerUnderTest("tessera", managed.target, managed.roots)
            model = await served_model(server)
            load = asyncio.create_task(run_cell(server, CellPlan(replace(workload, model=model), plan)))
            await asyncio.sleep(SETTLE_S)
            yield LoadedServer(pid, f"http://127.0.0.1:{managed.target.port}", log, load)
        finally:
            await managed.stop(10)
