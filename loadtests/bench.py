"""Cells on several servers in turn, so that what changes in the machine over time hits all of them alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from loadtests.cell import CellPlan, CellResult, ServerUnderTest, run_cell
from loadtests.client import CompletionClient
from loadtests.errors import LoadTestError
from loadtests.server import ManagedServer, ServerCommand
from loadtests.summary import LatencyTarget
from loadtests.watch import Limits, Verdict, wait_until_quiet

MAX_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class MeasuringRules:
    """How every cell is measured, whatever the server.

    A cell waits up to `wait_quiet_s` for the machine to be quiet, and one that turns out disturbed is measured again
    up to `max_retries` times: by what else ran, never by what came out.
    """

    limits: Limits = field(default_factory=Limits)
    latency_target: LatencyTarget | None = None
    wait_quiet_s: float = 0.0
    max_retries: int = 0


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to start and measure. With `together`, all servers run all the time and take turns cell by cell: finer
    turns, but each is measured beside the idle others. Otherwise one runs at a time and they take turns by round."""

    servers: Sequence[ServerCommand]
    cells: Sequence[CellPlan]
    rounds: int = 1
    together: bool = False
    ready_timeout_s: float = 300.0
    stop_timeout_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)


Progress = Callable[[str], None]


async def run_cells(
    server: ServerUnderTest, cells: Iterable[CellPlan], rules: MeasuringRules, say: Progress, round_number: int = 1
) -> list[CellResult]:
    """Measures `cells` one after another on one server."""
    return [await _measure(server, cell, rules, say, round_number) for cell in cells]


class Bench:
    """Runs a plan. `results` and `notes` grow while it runs, and are what is there if it is cut short."""

    def __init__(self, plan: BenchPlan, rules: MeasuringRules, log_directory: Path, say: Progress) -> None:
        names = [server.name for server in plan.servers]
        if len(set(names)) < len(names):
            raise LoadTestError(f"two servers of one name among {', '.join(names)}")
        if not 1 <= plan.rounds <= MAX_ROUNDS:
            raise LoadTestError(f"rounds: 1 to {MAX_ROUNDS}")
        self._plan = plan
        self._rules = rules
        self._log_directory = log_directory
        self._say = say
        self.results: list[CellResult] = []
        self.notes: list[str] = [f"{server.name}: `{server.command}`" for server in plan.servers]

    async def run(self) -> None:
        """Raises LoadTestError; whatever happens, every server it started is stopped."""
        await (self._together() if self._plan.together else self._in_turn())

    async def _in_turn(self) -> None:
        for round_number in range(1, self._plan.rounds + 1):
            for command in self._order(round_number):
                async with self._running(command, round_number) as server:
                    self.results += await run_cells(server, self._plan.cells, self._rules, self._say, round_number)

    async def _together(self) -> None:
        async with self._all_running(list(self._plan.servers)) as servers:
            for round_number in range(1, self._plan.rounds + 1):
                for cell in self._plan.cells:
                    for command in self._order(round_number):
                        server = servers[command.name]
                        self.results += await run_cells(server, [cell], self._rules, self._say, round_number)

    def _order(self, round_number: int) -> list[ServerCommand]:
        """There and back again: A B, B A, A B. A steady drift of the machine then favours nobody."""
        servers = list(self._plan.servers)
        return servers if round_number % 2 else servers[::-1]

    @asynccontextmanager
    async def _running(self, command: ServerCommand, round_number: int) -> AsyncGenerator[ServerUnderTest]:
        managed = ManagedServer(command, self._log_directory / f"server-{command.name}-{round_number}.log")
        try:
            self._say(f"{command.name}: starting")
            ready_s = await managed.start(self._plan.ready_timeout_s)
            self._say(f"{command.name}: ready after {ready_s:.1f} s")
            self.notes.append(f"{command.name}, start {round_number}: ready after {ready_s:.1f} s")
            yield await self._under_test(managed)
        finally:
            await self._stop(managed)

    @asynccontextmanager
    async def _all_running(self, commands: list[ServerCommand]) -> AsyncGenerator[dict[str, ServerUnderTest]]:
        if not commands:
            yield {}
            return
        async with self._running(commands[0], 1) as first, self._all_running(commands[1:]) as others:
            yield {first.name: first, **others}

    async def _under_test(self, managed: ManagedServer) -> ServerUnderTest:
        server = ServerUnderTest(managed.name, managed.target, managed.roots, api_key=self._plan.api_key)
        return replace(server, model=await served_model(server))

    async def _stop(self, managed: ManagedServer) -> None:
        started_s = perf_counter()
        left = await asyncio.shield(managed.stop(self._plan.stop_timeout_s))
        if left:
            seconds = perf_counter() - started_s
            self.notes.append(f"{managed.name}: had to be killed after {seconds:.0f} s: {', '.join(sorted(left))}")


async def served_model(server: ServerUnderTest) -> str:
    """The name to put into requests: some servers insist on one. Raises ServerError."""
    client = CompletionClient(server.target, timeout_s=10.0, api_key=server.api_key)
    try:
        return await client.first_model()
    finally:
        client.close()


async def _measure(
    server: ServerUnderTest, cell: CellPlan, rules: MeasuringRules, say: Progress, round_number: int
) -> CellResult:
    for attempt in range(rules.max_retries + 1):
        if rules.wait_quiet_s and not await wait_until_quiet(server.roots, rules.limits, rules.wait_quiet_s):
            say(f"{server.name} {cell.name}: the machine did not become quiet within {rules.wait_quiet_s:g} s")
        result = await run_cell(
            server,
            cell,
            round_number=round_number,
            attempt=attempt,
            limits=rules.limits,
            latency_target=rules.latency_target,
        )
        say(one_line(result))
        if result.disturbance.verdict is not Verdict.DISTURBED:
            break
    return result


def one_line(result: CellResult) -> str:
    """A cell for the terminal."""
    summary = result.summary
    ttft = "no first token" if summary.ttft_ms is None else f"TTFT p50 {summary.ttft_ms.p50:.1f} ms"
    failed = f", {summary.num_failed} failed" if summary.num_failed else ""
    return (
        f"{result.server} {result.plan.name}: {summary.output_tokens_per_s:.1f} tok/s, {ttft}, "
        f"{summary.num_succeeded} requests{failed} ({result.disturbance.verdict.value})"
    )
