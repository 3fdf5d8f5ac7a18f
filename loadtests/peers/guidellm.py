"""GuideLLM, another load client, on the same server and the same cell as ours: do two clients see the same?"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtests.bench import served_model
from loadtests.cell import CellPlan, ServerUnderTest, run_cell
from loadtests.errors import LoadTestError
from loadtests.peers.environment import Environment
from loadtests.plan import LoadPlan
from loadtests.report import markdown_table, number
from loadtests.server import ManagedServer, ServerCommand
from loadtests.summary import Summary
from loadtests.target import Target
from loadtests.workload import Workload

NAME = "guidellm"
VERSION = "guidellm==0.8.1"
CONCURRENCY = (1, 8, 32)
READY_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 30.0
OVERHEAD_S = 120.0
"""GuideLLM takes its time to start and to write, beside measuring."""


class CheckError(LoadTestError):
    """GuideLLM did not measure anything."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one client says of one cell; times in milliseconds."""

    client: str
    concurrency: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    tpot_p50_ms: float
    num_requests: int


def install(peers: Path) -> Environment:
    """Raises InstallError."""
    environment = Environment(peers / NAME)
    if not environment.is_complete(VERSION):
        environment.create()
        environment.pip("install", VERSION)
        environment.complete(VERSION)
    return environment


async def check(command: str, environment: Environment, tokenizer: Path, out: Path, seconds: float) -> list[Seen]:
    """Starts the server of `command` and measures each concurrency with our client, then with GuideLLM."""
    managed = ManagedServer(ServerCommand("tessera", command), out / "server.log")
    found = []
    try:
        await managed.start(READY_TIMEOUT_S)
        for concurrency in CONCURRENCY:
            found.append(await _ours(managed, concurrency, seconds))
            report = out / f"guidellm-{concurrency}.json"
            await _run_guidellm(environment, managed.target, tokenizer, concurrency, seconds, report)
            found.append(_load_report(report, concurrency))
    finally:
        await managed.stop(STOP_TIMEOUT_S)
    return found


async def _ours(managed: ManagedServer, concurrency: int, seconds: float) -> Seen:
    server = ServerUnderTest(managed.name, managed.target, managed.roots)
    plan = CellPlan(Workload(), LoadPlan(concurrency=concurrency, duration_s=seconds, num_warmup=concurrency))
    result = await run_cell(replace(server, model=await served_model(server)), plan)
    return _of_summary(result.summary, concurrency)


def _of_summary(summary: Summary, concurrency: int) -> Seen:
    if summary.ttft_ms is None or summary.tpot_ms is None:
        raise CheckError(f"no request succeeded: {dict(summary.errors)}")
    return Seen(
        client="loadtests",
        concurrency=concurrency,
        tokens_per_s=summary.output_tokens_per_s,
        ttft_p50_ms=summary.ttft_ms.p50,
        ttft_p95_ms=summary.ttft_ms.p95,
        tpot_p50_ms=summary.tpot_ms.p50,
        num_requests=summary.num_succeeded,
    )


async def _run_guidellm(
    environment: Environment, target: Target, tokenizer: Path, concurrency: int, seconds: float, report: Path
) -> None:
    workload = Workload()
    arguments = {
        "backend": f"kind=openai_http,target={target.url},request_format=/v1/completions",
        "profile": f"kind=concurrent,streams={concurrency}",
        "constraint": f"kind=max_duration,seconds={seconds:g}",
        "tokenizer": f"kind=huggingface_auto,model={tokenizer}",
        "data": f"kind=synthetic_text,prompt_tokens={workload.prompt_tokens},output_tokens={workload.output_tokens}",
        "output": f"kind=json,path={report}",
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    log = report.with_suffix(".log")
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(str(environment.bin / "python"), "-m", NAME, "run", *words, "--disable-console-interactive"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            async with asyncio.timeout(seconds + OVERHEAD_S):
                code = await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise CheckError(f"guidellm did not end in time ({log})") from None
    if code:
        raise CheckError(f"guidellm ended with {code} ({log})")


def _load_report(path: Path, concurrency: int) -> Seen:
    try:
        return read_report(json.loads(path.read_text(encoding="utf-8")), concurrency)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckError(f"{path}: {error!r}") from error


def read_report(report: Mapping[str, Any], concurrency: int) -> Seen:
    """Of GuideLLM's JSON. Its ITL is the time from first to last token over the tokens after the first: our TPOT.

    Raises CheckError where no request was answered to its end.
    """
    metrics = report["benchmarks"][0]["metrics"]
    num_requests = metrics["request_totals"]["successful"]
    if not num_requests:
        raise CheckError(f"guidellm saw no request to its end at concurrency {concurrency}; give it more --seconds")
    ttft, itl = (metrics[name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    return Seen(
        client=NAME,
        concurrency=concurrency,
        tokens_per_s=metrics["output_tokens_per_second"]["total"]["mean"],
        ttft_p50_ms=ttft["median"],
        ttft_p95_ms=ttft["percentiles"]["p95"],
        tpot_p50_ms=itl["median"],
        num_requests=num_requests,
    )


def check_table(found: list[Seen]) -> str:
    """One line for each cell and client."""
    head = ["cell", "client", "tok/s", "TTFT p50", "TTFT p95", "TPOT p50", "requests"]
    lines = [
        [
            *(f"c{seen.concurrency}", seen.client, number(seen.tokens_per_s), number(seen.ttft_p50_ms)),
            *(number(seen.ttft_p95_ms), number(seen.tpot_p50_ms), str(seen.num_requests)),
        ]
        for seen in found
    ]
    return markdown_table(head, lines)
