"""Memory over context: a server started anew for each length, and what it takes more while it holds such sequences.

Anonymous memory of all of the server's processes, before the first request and at its largest since.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loadtests.bench import served_model
from loadtests.cell import CellPlan, ServerUnderTest, run_cell
from loadtests.errors import LoadTestError
from loadtests.plan import LoadPlan
from loadtests.procfs import read_pss_bytes
from loadtests.report import markdown_table, number
from loadtests.server import ManagedServer, ServerCommand
from loadtests.shape import Shape
from loadtests.workload import Workload

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
USERS = 4
OUTPUT_TOKENS = 128
"""At most, and half of a short context: so many that the first is still there when the last has been absorbed."""
SAMPLE_PERIOD_S = 0.1
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """`USERS` sequences of `context` tokens at a time, the last `OUTPUT_TOKENS` at most of them generated."""

    context: int
    idle_bytes: int
    peak_bytes: int
    ttft_p50_ms: float | None
    tpot_p50_ms: float | None
    num_failed: int
    verdict: str

    @property
    def bytes_per_sequence(self) -> float:
        return (self.peak_bytes - self.idle_bytes) / USERS


class MemoryCurve:
    """The points of one shape, written into `out` as memory.json, memory.md and, with matplotlib, memory.png."""

    def __init__(self, shape: Shape, out: Path, contexts: Sequence[int] = CONTEXTS) -> None:
        self._shape = shape
        self._out = out
        self._contexts = contexts
        self.points: list[MemoryPoint] = []

    def run(self) -> int:
        """Returns 0, or 1 where requests failed. Raises LoadTestError."""
        asyncio.run(self._measure_all())
        self.save()
        return 1 if any(point.num_failed for point in self.points) else 0

    def save(self) -> None:
        points = [asdict(point) for point in self.points]
        (self._out / "memory.json").write_text(json.dumps({"shape": self._shape.preset, "points": points}, indent=1))
        text = memory_table(self.points)
        (self._out / "memory.md").write_text(text + "\n", encoding="utf-8")
        print(f"{self._shape.preset}\n\n{text}")
        with suppress(ImportError):
            save_plot(self.points, self._out / "memory.png")

    async def _measure_all(self) -> None:
        for context in self._contexts:
            self.points.append(await self._measure(context))
            point = self.points[-1]
            print(f"{self._shape.preset} {context}: {point.peak_bytes / MIB:.0f} MiB", file=sys.stderr, flush=True)

    async def _measure(self, context: int) -> MemoryPoint:
        command = self._shape.tessera(
            "bfloat16", "--no-prefix-cache", max_num_seqs=USERS, max_model_len=max(self._contexts)
        )
        managed = ManagedServer(ServerCommand("tessera", command), self._out / f"server-{context}.log")
        try:
            await managed.start(READY_TIMEOUT_S)
            return await self._with_server(managed, context)
        finally:
            await managed.stop(STOP_TIMEOUT_S)

    async def _with_server(self, managed: ManagedServer, context: int) -> MemoryPoint:
        server = ServerUnderTest(managed.name, managed.target, managed.roots)
        server = replace(server, model=await served_model(server))
        output_tokens = min(OUTPUT_TOKENS, context // 2)
        workload = Workload(f"context-{context}", context - output_tokens, output_tokens)
        plan = CellPlan(workload, LoadPlan(concurrency=USERS, num_requests=USERS, request_timeout_s=300.0))
        idle_bytes = _pss_bytes(managed)
        peak = _Peak(managed)
        sampler = asyncio.create_task(peak.follow())
        try:
            result = await run_cell(server, plan)
        finally:
            sampler.cancel()
        if result.summary.num_failed == USERS:
            raise LoadTestError(f"context {context}: every request failed: {dict(result.summary.errors)}")
        summary = result.summary
        return MemoryPoint(
            context=context,
            idle_bytes=idle_bytes,
            peak_bytes=max(peak.num_bytes, _pss_bytes(managed)),
            ttft_p50_ms=None if summary.ttft_ms is None else summary.ttft_ms.p50,
            tpot_p50_ms=None if summary.tpot_ms is None else summary.tpot_ms.p50,
            num_failed=summary.num_failed,
            verdict=result.disturbance.verdict.value,
        )


class _Peak:
    """The most memory seen."""

    def __init__(self, server: ManagedServer) -> None:
        self._server = server
        self.num_bytes = 0

    async def follow(self) -> None:
        while True:
            self.num_bytes = max(self.num_bytes, _pss_bytes(self._server))
            await asyncio.sleep(SAMPLE_PERIOD_S)


def _pss_bytes(server: ManagedServer) -> int:
    return sum(read_pss_bytes(pid) for pid in server.roots())


def memory_table(points: Sequence[MemoryPoint]) -> str:
    """One line for each context; memory in MiB, times in milliseconds."""
    head = ["context", "verdict", "idle MiB", "peak MiB", "MiB a sequence", "KiB a token", "TTFT p50", "TPOT p50"]
    lines = [
        [
            str(point.context),
            point.verdict,
            number(point.idle_bytes / MIB),
            number(point.peak_bytes / MIB),
            number(point.bytes_per_sequence / MIB),
            number(point.bytes_per_sequence / 1024 / point.context),
            number(point.ttft_p50_ms),
            number(point.tpot_p50_ms),
        ]
        for point in points
    ]
    return markdown_table(head, lines)


def save_plot(points: Sequence[MemoryPoint], path: Path) -> None:
    """Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    contexts = [point.context for point in points]
    axes.plot(contexts, [point.peak_bytes / MIB for point in points], marker="o", label="at its largest")
    axes.plot(contexts, [point.idle_bytes / MIB for point in points], marker="o", label="before the first request")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"tokens of each of {USERS} sequences")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
