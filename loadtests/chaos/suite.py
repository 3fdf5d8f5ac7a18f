"""Runs cases one after the other on one server, each under load, and keeps what its clients saw."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.chaos.cases import CASES, WHOLE_TIMEOUT_S, Blow
from loadtests.chaos.crowd import Asked, Crowd, Tally
from loadtests.chaos.question import questions
from loadtests.chaos.reading import Outcome, read
from loadtests.chaos.stage import Stage
from loadtests.client import CompletionClient
from loadtests.errors import ServerError
from loadtests.machine import read_machine
from loadtests.server import ManagedServer, ServerCommand

NUM_REPLICAS = 2
NUM_GATEWAYS = 2
_NUM_QUESTIONS = 33
_ANSWER_TIMEOUT_S = 120.0
_IDLE_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 30.0
# The load is there for so long before anything breaks, and goes on for so long when all is whole again.
_BEFORE_S = (0.8, 1.6)
_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """`cases` are keys of `CASES`. `command` and, for cases on nodes, `nodes_command` have {port} and {orders}, a
    directory."""

    command: str
    nodes_command: str
    cases: tuple[str, ...]
    size: int = 16
    seed: int = 0
    max_seconds: float = 900.0


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What the clients of one case saw. `held` is what the engines held when nobody asked any more."""

    name: str
    tally: Tally
    num_resumed: int = 0
    recovered_s: float | None = None
    note: str = ""
    held: str = ""
    problem: str = ""

    @property
    def is_passed(self) -> bool:
        return not (self.tally.counts[Outcome.LOST] or self.held or self.problem)

    def to_json(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "case": self.name,
            "what": CASES[self.name].what,
            "accepted": tally.num_accepted,
            **{result.value: tally.counts[result] for result in Outcome},
            "resumed": self.num_resumed,
            "recovered_s": self.recovered_s,
            "longest_pause_s": round(tally.longest_pause_s, 2),
            "note": self.note,
            "held_at_rest": self.held,
            "problem": self.problem,
            "reasons": tally.reasons,
            "passed": self.is_passed,
        }


@dataclass(slots=True)
class Suite:
    """One run. `results` has what was done so far, whatever becomes of the rest."""

    plan: ChaosPlan
    directory: Path
    say: Callable[[str], None]
    results: list[CaseResult] = field(default_factory=list)

    async def run(self) -> None:
        """Raises ServerError where the server does not start, TimeoutError after `max_seconds`."""
        orders = self.directory / "orders"
        orders.mkdir(exist_ok=True)
        for old in orders.iterdir():
            old.unlink()
        alone = [name for name in self.plan.cases if not CASES[name].is_on_nodes]
        on_nodes = [name for name in self.plan.cases if CASES[name].is_on_nodes]
        async with asyncio.timeout(self.plan.max_seconds):
            if alone:
                await self._cases(alone, ServerCommand("chaos", _told(self.plan.command, orders)), orders, 0)
            if on_nodes:
                command = ServerCommand("chaos-nodes", _told(self.plan.nodes_command, orders))
                await self._cases(on_nodes, command, orders, NUM_GATEWAYS)

    async def _cases(self, names: Sequence[str], command: ServerCommand, orders: Path, num_gateways: int) -> None:
        server = ManagedServer(command, self.directory / f"{command.name}.log")
        client = CompletionClient(server.target, timeout_s=_ANSWER_TIMEOUT_S)
        stage = Stage(server, client, orders, NUM_REPLICAS, num_gateways)
        try:
            await server.start(WHOLE_TIMEOUT_S)
            await stage.until_whole(WHOLE_TIMEOUT_S)
            asked = await _undisturbed(client, self.plan.seed)
            for name in names:
                self.results.append(await self._case(name, stage, server, asked))
                self.say(_line(self.results[-1]))
        finally:
            client.close()
            await server.stop(_STOP_TIMEOUT_S)

    async def _case(self, name: str, stage: Stage, server: ManagedServer, asked: Sequence[Asked]) -> CaseResult:
        seed = f"{self.plan.seed}:{name}"
        rng = random.Random(seed)
        case = CASES[name]
        crowd = Crowd(server.target, stage.client, asked, self.plan.size, seed, may_be_cut=case.may_cut)
        before = await stage.count("mosaic_request_resumptions_total")
        blow, problem = Blow(0.0), ""
        async with crowd:
            await asyncio.sleep(rng.uniform(*_BEFORE_S))
            try:
                blow = await case.strike(stage, crowd, rng)
            except ServerError as error:
                problem = str(error)
            await asyncio.sleep(_AFTER_S)
        held = await stage.until_idle(_IDLE_TIMEOUT_S)
        # A gateway that was broken has taken its count with it.
        resumed = max(await stage.count("mosaic_request_resumptions_total") - before, 0)
        recovered_s = None if problem else round(blow.recovered_s, 1)
        return CaseResult(name, crowd.tally, int(resumed), recovered_s, blow.note, held, problem)


def _told(command: str, orders: Path) -> str:
    return command.replace("{orders}", str(orders.resolve()))


async def _undisturbed(client: CompletionClient, seed: int) -> list[Asked]:
    """The answers of the server before anything was done to it."""
    asked = []
    for question in questions(seed, _NUM_QUESTIONS):
        answer = await client.post("/v1/completions", question.body)
        if answer.head.status != 200:
            raise ServerError(f"an undisturbed {question.kind} is answered {answer.head.status}: {answer.body[:300]!r}")
        asked.append((question, read(question, answer.body)))
    return asked


def report(results: Sequence[CaseResult]) -> str:
    """The table."""
    counted = ("accepted", "finished", "resumed", "failed clearly", "cut", "lost", "refused")
    names = ("case", *counted, "whole after", "longest pause")
    lines = ["| " + " | ".join(names) + " | |", "| --- |" + " ---: |" * (len(names) - 1) + " --- |"]
    for result in results:
        counts, tally, case = result.tally.counts, result.tally, CASES[result.name]
        whole = "never" if result.recovered_s is None else f"{result.recovered_s:.1f} s"
        cells = [case.what, str(tally.num_accepted), str(counts[Outcome.FINISHED]), str(result.num_resumed)]
        cells += [str(counts[each]) for each in (Outcome.FAILED, Outcome.CUT, Outcome.LOST, Outcome.REFUSED)]
        cells += [whole, f"{tally.longest_pause_s:.1f} s", result.note]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for result in results:
        if not result.is_passed:
            what = "; ".join(filter(None, (result.problem, result.held and f"held at rest: {result.held}")))
            lines.append(f"FAILED: {result.name}: {what} {' / '.join(result.tally.reasons)}")
    return "\n".join(lines) + "\n"


def save(results: Sequence[CaseResult], plan: ChaosPlan, directory: Path) -> None:
    """Writes chaos.json and chaos.md."""
    described = {
        "created_s": int(time.time()),
        "seed": plan.seed,
        "clients": plan.size,
        "machine": read_machine().described(),
        "cases": [result.to_json() for result in results],
    }
    (directory / "chaos.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (directory / "chaos.md").write_text(report(results), encoding="utf-8")


def _line(result: CaseResult) -> str:
    counts = " ".join(f"{each.value} {result.tally.counts[each]}" for each in Outcome)
    rest = f"resumed {result.num_resumed} whole after {result.recovered_s} s {result.note} {result.problem}"
    return f"{result.name}: {counts} {rest}"
