"""One cell of a table: one server, one workload, one load. Runs it and keeps everything that was seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from loadtests.client import CompletionClient
from loadtests.load import Measurement, run_load
from loadtests.plan import LoadPlan
from loadtests.record import Phase, RequestRecord
from loadtests.summary import LatencyTarget, Summary, summarise
from loadtests.target import Target
from loadtests.watch import Disturbance, Limits, Verdict, Watch, judge
from loadtests.workload import Workload

SETTLE_S = 0.3
"""After a cell, for the server to drop the requests that were hung up on."""


@dataclass(frozen=True, slots=True)
class CellPlan:
    """What to run. `name` is the same for every server that is compared."""

    workload: Workload
    load: LoadPlan

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.load.name}"


@dataclass(frozen=True, slots=True)
class ServerUnderTest:
    """Where a server is, how it is called in the tables, and which processes it consists of, as far as known."""

    name: str
    target: Target
    roots: Callable[[], Iterable[int]]
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class CellResult:
    """One cell as measured."""

    server: str
    round: int
    attempt: int
    plan: CellPlan
    summary: Summary
    disturbance: Disturbance
    measurement: Measurement = field(repr=False)

    def described(self, *, with_events: bool = False) -> dict[str, Any]:
        """For a results file."""
        origin_s = self.measurement.opened_s
        return {
            "server": self.server,
            "round": self.round,
            "attempt": self.attempt,
            "cell": self.plan.name,
            "workload": self.plan.workload.described(),
            "load": self.plan.load.described(),
            "summary": self.summary.described(),
            "disturbance": self.disturbance.described(),
            "requests": [record.described(origin_s, with_events=with_events) for record in self.measurement.records],
        }


async def run_cell(
    server: ServerUnderTest,
    plan: CellPlan,
    *,
    round_number: int = 1,
    attempt: int = 0,
    limits: Limits | None = None,
    latency_target: LatencyTarget | None = None,
) -> CellResult:
    """Every round and attempt has prompts of its own, the same for every server: no cache sees one twice."""
    salt = f"{plan.name}:{round_number}:{attempt}"
    workload = replace(plan.workload, salt=salt, model=plan.workload.model or server.model)
    client = CompletionClient(server.target, timeout_s=plan.load.request_timeout_s, api_key=server.api_key)
    watch = Watch(server.roots)
    try:
        measurement = await run_load(
            plan.load, _WorkloadSender(workload, client), watch, seed=f"{workload.seed}:{salt}"
        )
    finally:
        client.close()
    await asyncio.sleep(SETTLE_S)
    summary = summarise(measurement, output_tokens=workload.output_tokens, target=latency_target)
    disturbance = judge(watch.load(), limits or Limits())
    ran = CellPlan(workload, plan.load)
    return CellResult(server.name, round_number, attempt, ran, summary, disturbance, measurement)


def failures(results: Iterable[CellResult]) -> list[str]:
    """One line for each cell in which a measured request failed, with what the server said of the first."""
    return [
        f"{result.server}, {result.plan.name}: {result.summary.num_failed} of {result.summary.num_requests} failed: "
        f"{_errors(result)}"
        for result in results
        if result.summary.num_failed or not result.summary.num_requests
    ]


def _errors(result: CellResult) -> str:
    kinds = ", ".join(f"{kind} {count}" for kind, count in result.summary.errors.items())
    messages = [record.message for record in result.measurement.measured if record.message]
    return f"{kinds} ({messages[0]})" if messages else kinds or "none was sent"


def disturbances(results: Iterable[CellResult]) -> list[str]:
    """One line for each cell that may not be called clean."""
    return [
        f"{result.server}, {result.plan.name}: {result.disturbance.verdict.value}: "
        + "; ".join(result.disturbance.reasons)
        for result in results
        if result.disturbance.verdict is not Verdict.CLEAN
    ]


@dataclass(frozen=True, slots=True)
class _WorkloadSender:
    """Turns request numbers into requests of a workload."""

    workload: Workload
    client: CompletionClient

    async def send(self, index: int, phase: Phase, planned_s: float | None) -> RequestRecord:
        return await self.client.complete(self.workload.body(index), index, phase, planned_s=planned_s)

    def abandon(self) -> None:
        self.client.abandon()
