"""The options of the command line, and what they ask for. Starts nothing."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from loadtests.bench import BenchPlan, MeasuringRules
from loadtests.cell import CellPlan
from loadtests.chaos.cases import CASES
from loadtests.chaos.suite import ChaosPlan
from loadtests.errors import ResultsError, WorkloadError
from loadtests.plan import LoadPlan, default_num_requests
from loadtests.roofline import StepCosts
from loadtests.server import ServerCommand
from loadtests.soak import MIB, SoakPlan
from loadtests.summary import LatencyTarget
from loadtests.watch import Limits
from loadtests.workload import DEFAULT_TOKEN_RANGE, PRESET_CONCURRENCY, PRESETS, Workload, preset, read_texts

Item = TypeVar("Item")

MAX_CELLS = 64
MAX_SECONDS = 6 * 3600.0
_CHAOS_COMMAND = (
    f"{sys.executable} -m tests.chaos {{orders}} --port {{port}} --replicas 2 --threads 1 --memory 24MiB "
    "--max-num-seqs 16 --max-num-waiting 64 --resume-timeout 60"
)
_CHAOS_NODES_COMMAND = f"{sys.executable} -m tests.chaos.nodes --port {{port}}"
_NAMED_COMMAND = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests",
        description="Load tests of any server with OpenAI's completions protocol, over HTTP, on this machine.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a server that is running")
    run.add_argument("--url", required=True, help="such as http://127.0.0.1:8000; only this machine")
    run.add_argument("--name", default="server", help="how the server is called in the tables")
    run.add_argument("--server-pid", type=int, action="append", help="top of its process tree; default: the listener")
    run.add_argument("--i-own-this-host", action="store_true", help="allow a URL that is not this machine")
    run.add_argument("--out", type=Path, help="directory for results.json, report.md and plots")
    _add_shared(run)
    bench = commands.add_parser("bench", help="start servers, measure them in turn, print ratios, stop them")
    _add_bench(bench)
    _add_shared(bench)
    _add_soak(commands.add_parser("soak", help="mixed load for a long time on one server, then look for what is left"))
    _add_chaos(commands.add_parser("chaos", help="break a server's processes under load and tell what clients saw"))
    compared = commands.add_parser("compare", help="two results side by side: the second over the first")
    compared.add_argument("a", type=Path, metavar="A")
    compared.add_argument("b", type=Path, metavar="B")
    compared.add_argument("--server-a", help="a server in A, where there are several")
    compared.add_argument("--server-b", help="a server in B, where there are several")
    return parser


def cell_plans(options: argparse.Namespace) -> list[CellPlan]:
    """One cell for each concurrency and rate, and the workloads taken along. Raises WorkloadError."""
    workload = _workload(options)
    loads = [_load(options, concurrency=concurrency) for concurrency in options.concurrency or ()]
    loads += [_load(options, rate=rate) for rate in options.rate or ()]
    cells = [CellPlan(workload, load) for load in loads or [_load(options, concurrency=1)]]
    beside = _load(options, concurrency=PRESET_CONCURRENCY)
    cells += [CellPlan(preset(name, workload), beside) for name in options.also or ()]
    if len({cell.name for cell in cells}) < len(cells) or len(cells) > MAX_CELLS:
        raise WorkloadError(f"each cell once, and at most {MAX_CELLS} of them")
    return cells


def measuring_rules(options: argparse.Namespace) -> MeasuringRules:
    limits = replace(Limits(), other=options.max_other_cores)
    target = None if options.goodput is None else LatencyTarget(options.goodput)
    return MeasuringRules(limits, target, options.wait_quiet, options.retry_disturbed)


def bench_plan(options: argparse.Namespace) -> BenchPlan:
    return BenchPlan(
        servers=[_server(text, i) for i, text in enumerate(options.server_command or _default_commands())],
        cells=cell_plans(options),
        rounds=options.rounds,
        together=options.together,
        ready_timeout_s=options.ready_timeout,
        stop_timeout_s=options.stop_timeout,
        api_key=api_key(options),
    )


def api_key(options: argparse.Namespace) -> str | None:
    """From the environment: on a command line, every user of the machine could read it."""
    return os.environ.get(options.api_key_env)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--server-command",
        action="append",
        metavar="[NAME=]COMMAND",
        help="a server to start, with {port} where its port goes; repeatable, the first is the base of the ratios. "
        "Default: Tessera in one process and on Ray",
    )
    bench.add_argument("--rounds", type=_whole(1), default=2, help="how often each server has its turn")
    bench.add_argument("--together", action="store_true", help="all servers run at once and take turns cell by cell")
    bench.add_argument("--ready-timeout", type=_seconds, default=300.0, metavar="S")
    bench.add_argument("--stop-timeout", type=_seconds, default=30.0, metavar="S")
    bench.add_argument("--out", type=Path, required=True, help="directory for results, plots and server logs")


def soak_plan(options: argparse.Namespace) -> SoakPlan:
    return SoakPlan(
        command=_server(options.server_command or _default_commands()[0], 0),
        duration_s=options.minutes * 60,
        concurrency=options.concurrency,
        seed=options.seed,
        ready_timeout_s=options.ready_timeout,
        max_growth_bytes=int(options.max_growth_mib * MIB),
    )


def _add_soak(soak: argparse.ArgumentParser) -> None:
    soak.add_argument("--minutes", type=_seconds, default=30.0)
    soak.add_argument("--server-command", metavar="[NAME=]COMMAND", help="default: Tessera in one process")
    soak.add_argument("--concurrency", type=_whole(1), default=24, metavar="N", help="clients at a time")
    soak.add_argument("--max-growth-mib", type=_seconds, default=16.0, metavar="MIB", help="of memory, after a warm-up")
    soak.add_argument("--seed", type=int, default=0, help="same seed, same requests")
    soak.add_argument("--ready-timeout", type=_seconds, default=120.0, metavar="S")
    soak.add_argument("--out", type=Path, required=True, help="directory for the result and the server's log")
    soak.add_argument("--overwrite", action="store_true", help="write into a directory that holds results")


def chaos_plan(options: argparse.Namespace) -> ChaosPlan:
    return ChaosPlan(
        command=options.server_command or _CHAOS_COMMAND,
        nodes_command=_CHAOS_NODES_COMMAND,
        cases=tuple(options.case or CASES),
        size=options.concurrency,
        seed=options.seed,
        max_seconds=options.max_seconds,
    )


def _add_chaos(chaos: argparse.ArgumentParser) -> None:
    chaos.add_argument("--case", action="append", choices=list(CASES), help="repeatable; default: all of them")
    chaos.add_argument(
        "--server-command", metavar="COMMAND", help="with {port} and {orders}, the directory of orders to break"
    )
    chaos.add_argument("--concurrency", type=_whole(1), default=16, metavar="N", help="clients at a time")
    chaos.add_argument("--seed", type=int, default=0, help="same seed, same requests and victims")
    chaos.add_argument("--max-seconds", type=_max_seconds, default=900.0, help="for all of it")
    chaos.add_argument("--out", type=Path, required=True, help="directory for the result and the server's log")
    chaos.add_argument("--overwrite", action="store_true", help="write into a directory that holds results")


def _add_shared(parser: argparse.ArgumentParser) -> None:
    _add_workload(parser.add_argument_group("what is asked"))
    _add_load(parser.add_argument_group("how often"))
    _add_rules(parser.add_argument_group("what counts"))


def _add_workload(group: argparse._ArgumentGroup) -> None:
    low, high = DEFAULT_TOKEN_RANGE
    group.add_argument("--model", help="default: the first the server names")
    group.add_argument("--prompt-tokens", type=_whole(1), default=128, metavar="N")
    group.add_argument("--output-tokens", type=_whole(1), default=128, metavar="N")
    group.add_argument("--shared-prefix-tokens", type=_whole(0), default=0, metavar="N", help="of the prompt")
    group.add_argument(
        "--prefixes", type=_whole(1), default=1, metavar="N", help="that are shared, one drawn each time"
    )
    group.add_argument("--prompts", type=Path, metavar="FILE", help="texts instead: a line each, or .jsonl")
    group.add_argument("--token-range", type=_token_range, default=(low, high), metavar="LOW:HIGH")
    group.add_argument("--seed", type=int, default=0, help="same seed, same prompts and arrivals")
    group.add_argument("--respect-eos", action="store_true", help="let a model end early")
    group.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="more request fields")
    group.add_argument("--also", type=_list_of(str), metavar="NAMES", help=f"workloads besides: {', '.join(PRESETS)}")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--concurrency", type=_list_of(_whole(1)), metavar="LIST", help="closed loop, such as 1,8,32")
    group.add_argument("--rate", type=_list_of(float), metavar="LIST", help="open loop, Poisson arrivals a second")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--requests", type=_whole(1), metavar="N", help="measured in each cell; default: 4 rounds")
    amount.add_argument("--duration", type=_seconds, metavar="S", help="in which measured requests are sent")
    group.add_argument("--warmup-requests", type=_whole(0), metavar="N", help="default: one for each user")
    group.add_argument("--max-in-flight", type=_whole(1), default=256, metavar="N", help="of an open loop")
    group.add_argument("--request-timeout", type=_seconds, default=120.0, metavar="S")
    group.add_argument("--max-cell-seconds", type=_seconds, default=900.0, metavar="S")
    group.add_argument("--max-seconds", type=_max_seconds, default=3600.0, metavar="S", help="for all of it")


def _add_rules(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput", type=_latencies, metavar="TARGET", help="milliseconds, as ttft=200,tpot=50,e2e=9000"
    )
    group.add_argument(
        "--step-costs",
        type=_named_costs,
        action="append",
        default=[],
        metavar="SERVER=FILE",
        help="what `python -m model.kernels.roofline` printed for a server: its roofline stands beside what it did",
    )
    group.add_argument("--max-other-cores", type=float, default=Limits().other, metavar="CORES")
    group.add_argument("--wait-quiet", type=_seconds, default=0.0, metavar="S", help="for other work to end, per cell")
    group.add_argument("--retry-disturbed", type=_whole(0), default=0, metavar="N", help="measure such a cell again")
    group.add_argument("--allow-disturbed", action="store_true", help="exit 0 although other work was seen")
    group.add_argument("--allow-failures", action="store_true", help="exit 0 although requests failed")
    group.add_argument("--save-events", action="store_true", help="keep the arrival of every event")
    group.add_argument("--overwrite", action="store_true", help="replace results in --out")
    group.add_argument("--api-key-env", default="LOADTESTS_API_KEY", metavar="NAME", help="variable with the API key")


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(
        name="texts" if options.prompts else "standard",
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        shared_prefix_tokens=options.shared_prefix_tokens,
        num_prefixes=options.prefixes,
        token_range=options.token_range,
        seed=options.seed,
        model=options.model,
        ignore_eos=not options.respect_eos,
        texts=read_texts(options.prompts) if options.prompts else (),
        extra_body=options.extra_body,
    )


def _load(options: argparse.Namespace, *, concurrency: int | None = None, rate: float | None = None) -> LoadPlan:
    num_requests = options.requests
    if num_requests is None and options.duration is None:
        num_requests = default_num_requests(concurrency)
    return LoadPlan(
        concurrency=concurrency,
        rate=rate,
        num_requests=num_requests,
        duration_s=options.duration,
        num_warmup=(concurrency or 8) if options.warmup_requests is None else options.warmup_requests,
        request_timeout_s=options.request_timeout,
        max_cell_s=options.max_cell_seconds,
        max_in_flight=options.max_in_flight,
    )


def _server(text: str, index: int) -> ServerCommand:
    named = _NAMED_COMMAND.fullmatch(text)
    return ServerCommand(named[1], named[2]) if named else ServerCommand(f"server-{index + 1}", text)


def _default_commands() -> list[str]:
    serve = f"{sys.executable} -m service serve"
    return [f"local={serve} --local --port {{port}}", f"ray={serve} --port {{port}}"]


def _whole(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _max_seconds(text: str) -> float:
    if (value := _seconds(text)) > MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"at most {MAX_SECONDS:g}")
    return value


def _list_of(item: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    def items(text: str) -> list[Item]:
        try:
            return [item(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return items


def _named_costs(text: str) -> tuple[str, StepCosts]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not SERVER=FILE")
    try:
        return name, StepCosts.load(Path(path))
    except ResultsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _token_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not low.isdecimal() or not high.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH")
    return int(low), int(high)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def _latencies(text: str) -> dict[str, float]:
    try:
        return {name.strip(): float(limit) for name, _, limit in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MILLISECONDS,...") from None
