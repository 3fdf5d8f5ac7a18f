"""The command line: install peers, measure Tessera and them in turns on models of equal shape, check the client."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loadtests import cli
from loadtests.errors import LoadTestError
from loadtests.peers import guidellm
from loadtests.peers.contest import CONTESTS, USERS, Peers
from loadtests.peers.standing import Standing, save_standings_plot, standings, standings_report
from loadtests.results import load_results
from loadtests.rows import rows
from loadtests.shape import SHAPES, Shape
from loadtests.suite import CELLS

FILE_NAME = "standings.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the worst exit code of the runs, which are those of `python -m loadtests`."""
    options, more = _parser().parse_known_args(arguments)
    peers = Peers(options.peers_dir.absolute())
    try:
        if options.command == "check":
            return _check(peers, options)
        peers.install()
        for name, reason in peers.missing.items():
            print(f"{name} is missing: {reason}", file=sys.stderr)
        if options.command == "install":
            return 4 if peers.missing else 0
        return _bench(peers, options, more)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _check(peers: Peers, options: argparse.Namespace) -> int:
    """Both clients on the small shape."""
    shape = Shape(SHAPES[0], options.models)
    options.out.mkdir(parents=True, exist_ok=True)
    shape.prepare()
    environment = guidellm.install(peers.directory)
    tokenizer = peers.transformer(shape) / "hugging-face"
    command = shape.tessera("bfloat16", max_num_seqs=USERS)
    found = asyncio.run(guidellm.check(command, environment, tokenizer, options.out.absolute(), options.seconds))
    text = guidellm.check_table(found)
    (options.out / "check.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _bench(peers: Peers, options: argparse.Namespace, more: Sequence[str]) -> int:
    code, found = 0, []
    for name in options.shapes.split(","):
        shape, out = Shape(name, options.models), options.out / name
        out.mkdir(parents=True, exist_ok=True)
        shape.prepare()
        code = max(code, cli.main(_arguments(peers, shape, out, options.only, more)))
        found += standings(name, rows(load_results(out)))
        _save(found, peers, options.out)
    return code


def _arguments(peers: Peers, shape: Shape, out: Path, only: str | None, more: Sequence[str]) -> list[str]:
    """Of `python -m loadtests bench`: all servers at once, so that turns are as short as a cell."""
    wanted = None if only is None else set(only.split(","))
    commands = {name: command for name, command in peers.commands(shape).items() if wanted is None or name in wanted}
    arguments = ["bench", "--together", "--out", str(out), *CELLS]
    for name, command in commands.items():
        arguments += ["--server-command", f"{name}={command}"]
    for contest in CONTESTS:
        if contest.ours in commands:
            costs = out / f"costs-{contest.width}.json"
            shape.write_costs(costs, contest.width)
            arguments += ["--step-costs", f"{contest.ours}={costs}"]
    return [*arguments, *more]


def _save(found: Sequence[Standing], peers: Peers, out: Path) -> None:
    described = {"missing": peers.missing, "standings": [standing.described() for standing in found]}
    (out / FILE_NAME).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    text = standings_report(found, peers.missing)
    (out / "standings.md").write_text(text, encoding="utf-8")
    print(text, end="")
    with suppress(ImportError):
        save_standings_plot(found, out / "standings.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.peers",
        description="Tessera beside vLLM and llama.cpp. Options it does not know go to `python -m loadtests bench`.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="install what is not yet, and say what cannot be")
    bench = commands.add_parser("bench", help="install, then measure all in turns and print the table")
    bench.add_argument("--shapes", default=",".join(SHAPES), metavar="NAMES", help="default: %(default)s")
    bench.add_argument("--only", metavar="NAMES", help="of the servers, such as tessera,llama.cpp")
    check = commands.add_parser("check", help="the same cells with our client and with GuideLLM")
    check.add_argument("--seconds", type=float, default=10.0, help="of each cell (default: %(default)s)")
    for command in (bench, check):
        command.add_argument("--out", type=Path, required=True, help="directory for results")
        command.add_argument("--models", type=Path, default=Path("runs/models"), help="where they are kept, or made")
    for command in (install, bench, check):
        command.add_argument("--peers-dir", type=Path, default=Path("runs/peers"), help="default: %(default)s")
    return parser
