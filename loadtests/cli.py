"""The command line: `run` against a server that is there, `bench` with servers it starts, `compare` of two results."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtests.bench import Bench, run_cells, served_model
from loadtests.cell import CellResult, ServerUnderTest, disturbances, failures
from loadtests.chaos import suite as chaos
from loadtests.chaos.suite import Suite
from loadtests.compare import compare
from loadtests.errors import LoadTestError
from loadtests.options import api_key, bench_plan, build_parser, cell_plans, chaos_plan, measuring_rules, soak_plan
from loadtests.plots import save_plots
from loadtests.procfs import listener_pids
from loadtests.report import report
from loadtests.results import Results, load_results, prepare_directory
from loadtests.rows import rows
from loadtests.soak import Soak, save
from loadtests.soak import report as soak_report
from loadtests.target import resolve_target

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DISTURBED = 3
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 clean, 1 requests failed, 2 bad usage, 3 not clean, 4 a server did
    not start or answer, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    commands = {"run": _run, "bench": _bench, "compare": _compare, "soak": _soak, "chaos": _chaos}
    try:
        return commands[options.command](options)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    cells, rules = cell_plans(options), measuring_rules(options)
    target = resolve_target(options.url, is_owned=options.i_own_this_host)
    roots = options.server_pid or listener_pids(target.port)
    server = ServerUnderTest(options.name, target, lambda: roots, options.model, api_key(options))

    results: list[CellResult] = []
    if options.out is not None:
        prepare_directory(options.out, may_overwrite=options.overwrite)

    async def measure() -> None:
        named = server if server.model else replace(server, model=await served_model(server))
        for cell in cells:
            results.extend(await run_cells(named, [cell], rules, _say))

    return _measure_and_publish(measure(), results, [], options)


def _bench(options: argparse.Namespace) -> int:
    bench = Bench(bench_plan(options), measuring_rules(options), options.out, _say)
    prepare_directory(options.out, may_overwrite=options.overwrite)
    return _measure_and_publish(bench.run(), bench.results, bench.notes, options)


def _soak(options: argparse.Namespace) -> int:
    prepare_directory(options.out, may_overwrite=options.overwrite)
    soak = Soak(soak_plan(options), options.out / "server.log", _say)
    try:
        _run_loop(_result_of(soak))
    finally:
        save(soak.result, options.out)
        print(soak_report(soak.result), end="")
    return EXIT_FAILED if soak.result.problems else 0


def _chaos(options: argparse.Namespace) -> int:
    prepare_directory(options.out, may_overwrite=options.overwrite)
    plan = chaos_plan(options)
    suite = Suite(plan, options.out, _say)
    try:
        _run_loop(suite.run())
    except TimeoutError:
        _say(f"cut short by --max-seconds {plan.max_seconds:g}")
        return EXIT_FAILED
    finally:
        chaos.save(suite.results, plan, options.out)
        print(chaos.report(suite.results), end="")
    return 0 if all(result.is_passed for result in suite.results) else EXIT_FAILED


async def _result_of(soak: Soak) -> None:
    await soak.run()


def _compare(options: argparse.Namespace) -> int:
    first, second = load_results(options.a), load_results(options.b)
    print(compare(first, second, first_server=options.server_a, second_server=options.server_b), end="")
    return 0


def _measure_and_publish(
    work: Coroutine[Any, Any, None], results: list[CellResult], notes: list[str], options: argparse.Namespace
) -> int:
    """Runs `work`, which adds to `results` and `notes`, for as long as it may. What it measured is never lost."""

    async def bounded() -> None:
        async with asyncio.timeout(options.max_seconds):
            await work

    try:
        _run_loop(bounded())
    except TimeoutError:
        notes.append(f"Cut short by --max-seconds {options.max_seconds:g}: not every cell was measured.")
        _publish(results, notes, options)
        raise LoadTestError(notes[-1]) from None
    except (LoadTestError, KeyboardInterrupt, asyncio.CancelledError) as reason:
        first_line = str(reason).partition("\n")[0] or "interrupted"
        notes.append(f"Cut short: {first_line}")
        if results:
            _publish(results, notes, options)
        raise
    return _publish(results, notes, options)


def _publish(cells: Sequence[CellResult], notes: Sequence[str], options: argparse.Namespace) -> int:
    """Writes and prints the results, and says with the exit code whether they may be believed."""
    client = {"event_loop": "uvloop" if _has_uvloop() else "asyncio"}
    results = Results.of(cells, client, notes, with_events=options.save_events, step_costs=dict(options.step_costs))
    text = report(results)
    print(text, end="")
    if options.out is not None:
        results.save(options.out)
        (options.out / "report.md").write_text(text, encoding="utf-8")
        _plot(results, options.out)
    failed, unclean = failures(cells), disturbances(cells)
    for line in (*failed, *unclean):
        print(f"warning: {line}", file=sys.stderr)
    if failed and not options.allow_failures:
        return EXIT_FAILED
    return EXIT_DISTURBED if unclean and not options.allow_disturbed else 0


def _plot(results: Results, directory: Path) -> None:
    try:
        save_plots(rows(results), directory)
    except ImportError:
        _say("no plots: matplotlib is not installed")


def _run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` on the cheaper event loop there is. SIGTERM cancels it, so that servers are stopped."""

    async def guarded() -> None:
        task = asyncio.ensure_future(work)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await task

    factory = None
    if _has_uvloop():
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(guarded())


def _has_uvloop() -> bool:
    return find_spec("uvloop") is not None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
