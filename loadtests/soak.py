"""Mixed load on one server for a long time, and whether anything is left behind: memory, blocks, requests."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from loadtests.client import CompletionClient
from loadtests.errors import ServerError
from loadtests.exposition import gauge_sum
from loadtests.http1 import MalformedResponse
from loadtests.mixture import MixedRequest, Outcome, fault, mixed_request
from loadtests.procfs import read_pss_bytes
from loadtests.server import ManagedServer, ServerCommand

MIB = 2**20
MAX_TOLD_FAULTS = 10
SETTLE_S = 30.0
_NUM_SAMPLES = 400
_MIN_PERIOD_S = 0.25
# The first part of a run, in which caches fill and allocators find their size, says nothing of a leak.
_WARM_UP_SHARE = 1 / 3

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """`concurrency` clients for `duration_s`. `max_growth_bytes` is what memory may gain after the warm-up."""

    command: ServerCommand
    duration_s: float
    concurrency: int = 24
    seed: int = 0
    request_timeout_s: float = 120.0
    ready_timeout_s: float = 120.0
    stop_timeout_s: float = 60.0
    max_growth_bytes: int = 16 * MIB


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment. `pss_bytes` is its processes' memory, shared pages divided among those that share."""

    at_s: float
    pss_bytes: int
    num_running: float
    num_waiting: float
    num_used_blocks: float
    num_used_slots: float

    @property
    def is_idle(self) -> bool:
        return not (self.num_running or self.num_waiting or self.num_used_blocks or self.num_used_slots)


@dataclass(slots=True)
class SoakResult:
    """What was sent, what went wrong, and how the server looked meanwhile and, last, at rest."""

    duration_s: float
    max_growth_bytes: int
    sent: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    samples: list[Sample] = field(default_factory=list)
    rest: Sample | None = None

    @property
    def growth_bytes(self) -> float:
        """What memory gained after the warm-up, by the straight line that fits it best."""
        settled = self.samples[int(len(self.samples) * _WARM_UP_SHARE) :]
        if len(settled) < 2:
            return 0.0
        mean_s = sum(s.at_s for s in settled) / len(settled)
        mean = sum(s.pss_bytes for s in settled) / len(settled)
        spread = sum((s.at_s - mean_s) ** 2 for s in settled)
        slope = sum((s.at_s - mean_s) * (s.pss_bytes - mean) for s in settled) / spread
        return slope * (settled[-1].at_s - settled[0].at_s)

    @property
    def problems(self) -> list[str]:
        """Empty for a server that kept all its promises."""
        found = []
        if self.num_faults:
            found.append(f"{self.num_faults} wrong answers, such as: {self.faults[0]}")
        if self.growth_bytes > self.max_growth_bytes:
            grown, allowed = self.growth_bytes / MIB, self.max_growth_bytes / MIB
            found.append(f"memory grew by {grown:.1f} MiB after the warm-up, more than {allowed:.0f}")
        if self.rest is None or not self.rest.is_idle:
            found.append(f"at rest the server still held something: {self.rest}")
        return found

    def to_json(self) -> dict[str, Any]:
        plain = asdict(replace(self, sent=Counter()))
        return plain | {"sent": dict(self.sent), "growth_bytes": self.growth_bytes, "problems": self.problems}


class Soak:
    """One run. `result` is there whatever becomes of it."""

    def __init__(self, plan: SoakPlan, log: Path, say: Say) -> None:
        self.plan = plan
        self.result = SoakResult(plan.duration_s, plan.max_growth_bytes)
        self._server = ManagedServer(plan.command, log)
        self._say = say
        self._started_s = 0.0

    async def run(self) -> SoakResult:
        """Raises ServerError where the server does not start, or dies."""
        plan, client = self.plan, CompletionClient(self._server.target, timeout_s=self.plan.request_timeout_s)
        try:
            await self._server.start(plan.ready_timeout_s)
            self._started_s = perf_counter()
            await self._load(client)
            self.result.rest = await self._at_rest(client)
        finally:
            client.close()
            left = await self._server.stop(plan.stop_timeout_s)
        if left:
            self._fault(f"the server left processes behind: {', '.join(left)}")
        return self.result

    async def _load(self, client: CompletionClient) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(client))
                for number in range(self.plan.concurrency):
                    group.create_task(self._user(client, random.Random(f"{self.plan.seed}:{number}")))
        except* ServerError as errors:
            raise ServerError(str(errors.exceptions[0])) from errors

    @property
    def _elapsed_s(self) -> float:
        return perf_counter() - self._started_s

    async def _user(self, client: CompletionClient, rng: random.Random) -> None:
        while self._elapsed_s < self.plan.duration_s:
            request = mixed_request(rng)
            self.result.sent[request.kind] += 1
            problem = await self._send(client, request)
            if problem is not None:
                self._fault(f"{request.kind}: {problem} (request {request.body[:300].decode(errors='replace')})")

    async def _send(self, client: CompletionClient, request: MixedRequest) -> str | None:
        try:
            async with asyncio.timeout(request.leaves_after_s):
                answer = await client.post("/v1/completions", request.body)
        except TimeoutError:
            return None if request.outcome is Outcome.LEFT else "no answer in time"
        except (OSError, MalformedResponse) as error:
            return f"{type(error).__name__}: {error}"
        return None if request.outcome is Outcome.LEFT else fault(request, answer.head.status, answer.body)

    async def _watch(self, client: CompletionClient) -> None:
        period_s = max(self.plan.duration_s / _NUM_SAMPLES, _MIN_PERIOD_S)
        said_s = 0.0
        while self._elapsed_s < self.plan.duration_s:
            sample = await self._sample(client)
            self.result.samples.append(sample)
            if sample.at_s - said_s >= max(self.plan.duration_s / 20, 5.0):
                said_s = sample.at_s
                self._say(
                    f"{sample.at_s:6.0f} s  {sum(self.result.sent.values())} requests  {sample.pss_bytes / MIB:.0f} MiB"
                    f"  {self.result.num_faults} faults"
                )
            await asyncio.sleep(period_s)

    async def _at_rest(self, client: CompletionClient) -> Sample:
        deadline_s = self._elapsed_s + SETTLE_S
        while not (sample := await self._sample(client)).is_idle and self._elapsed_s < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(_MIN_PERIOD_S)
        return sample

    async def _sample(self, client: CompletionClient) -> Sample:
        try:
            answer = await client.get("/metrics")
        except (OSError, MalformedResponse, TimeoutError) as error:
            raise ServerError(
                f"{self._server.name} does not answer /metrics: {error or type(error).__name__}"
            ) from error
        text = answer.body.decode()
        return Sample(
            at_s=self._elapsed_s,
            pss_bytes=sum(read_pss_bytes(pid) for pid in self._server.roots()),
            num_running=gauge_sum(text, "mosaic_num_requests_running"),
            num_waiting=gauge_sum(text, "mosaic_num_requests_waiting"),
            num_used_blocks=gauge_sum(text, "mosaic_memory_blocks", state="used"),
            num_used_slots=gauge_sum(text, "mosaic_state_slots", state="used"),
        )

    def _fault(self, text: str) -> None:
        self.result.num_faults += 1
        if len(self.result.faults) < MAX_TOLD_FAULTS:
            self.result.faults.append(text)


def report(result: SoakResult) -> str:
    """The run in a few lines of Markdown."""
    lines = [f"Soak of {result.duration_s / 60:.1f} minutes", "", "| kind | requests |", "| --- | ---: |"]
    lines += [f"| {kind} | {count} |" for kind, count in sorted(result.sent.items())]
    lines += [f"| all | {sum(result.sent.values())} |", ""]
    if result.samples:
        settled = result.samples[int(len(result.samples) * _WARM_UP_SHARE) :]
        memory = [sample.pss_bytes / MIB for sample in settled]
        lines.append(
            f"Memory after the warm-up: {min(memory):.0f} to {max(memory):.0f} MiB, "
            f"{result.growth_bytes / MIB:+.1f} MiB by its trend (allowed: {result.max_growth_bytes / MIB:.0f})."
        )
    if result.rest is not None:
        rest = result.rest
        lines.append(
            f"At rest: {rest.num_running:.0f} running, {rest.num_waiting:.0f} waiting, "
            f"{rest.num_used_blocks:.0f} blocks and {rest.num_used_slots:.0f} slots in use."
        )
    lines += [f"FAILED: {problem}" for problem in result.problems] or ["Passed: no wrong answer, nothing left behind."]
    return "\n".join(lines) + "\n"


def save(result: SoakResult, directory: Path) -> None:
    """Writes soak.json and soak.md."""
    (directory / "soak.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
    (directory / "soak.md").write_text(report(result), encoding="utf-8")
