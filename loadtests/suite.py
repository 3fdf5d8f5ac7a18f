"""Tessera alone, at the shapes that are compared elsewhere: all cells, throughput over users, memory over context.

    python -m loadtests.suite cells|curve|cache|memory --out DIR [--shapes small,gpt2s] [options of `bench`]

Each shape's results lie in DIR/SHAPE as `python -m loadtests bench` writes them, which is what runs underneath.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests import cli
from loadtests.errors import LoadTestError
from loadtests.memory import MemoryCurve
from loadtests.shape import SHAPES, WIDTHS, Shape

CELLS = ("--concurrency", "1,8,32", "--also", "long,prefix")
CURVE = ("--concurrency", "1,2,4,8,16,32,64,128")
UNSHARED = ("--concurrency", "1,8,32", "--also", "long")
MAX_NUM_SEQS = 32
NO_CACHE = "--no-prefix-cache"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the worst exit code of the runs, which are those of `python -m loadtests`."""
    options, more = _parser().parse_known_args(arguments)
    code = 0
    try:
        for name in options.shapes.split(","):
            shape = Shape(name, options.models)
            out = options.out / name
            out.mkdir(parents=True, exist_ok=True)
            shape.prepare()
            code = max(code, _memory(shape, out) if options.what == "memory" else _bench(shape, out, options, more))
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return code


def _bench(shape: Shape, out: Path, options: argparse.Namespace, more: Sequence[str]) -> int:
    servers, cells = {
        "cells": (_by_width(shape, MAX_NUM_SEQS), CELLS),
        "curve": (_by_width(shape, 128), CURVE),
        "cache": (_with_and_without_cache(shape), UNSHARED),
    }[options.what]
    arguments = ["bench", "--out", str(out), *cells]
    for server, (width, command) in servers.items():
        costs = out / f"costs-{width}.json"
        shape.write_costs(costs, width)
        arguments += ["--server-command", f"{server}={command}", "--step-costs", f"{server}={costs}"]
    return cli.main([*arguments, *more])


def _by_width(shape: Shape, max_num_seqs: int) -> dict[str, tuple[str, str]]:
    return {width: (width, shape.tessera(width, max_num_seqs=max_num_seqs)) for width in WIDTHS}


def _with_and_without_cache(shape: Shape) -> dict[str, tuple[str, str]]:
    """The one without is the base of the ratios."""
    kinds = {"no-cache": (NO_CACHE,), "cache": ()}
    return {
        server: ("bfloat16", shape.tessera("bfloat16", *given, max_num_seqs=MAX_NUM_SEQS))
        for server, given in kinds.items()
    }


def _memory(shape: Shape, out: Path) -> int:
    return MemoryCurve(shape, out).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.suite",
        description="Measures Tessera at known shapes. Options it does not know go to `python -m loadtests bench`.",
    )
    parser.add_argument("what", choices=("cells", "curve", "cache", "memory"))
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="where they are kept, or made")
    parser.add_argument("--out", type=Path, required=True, help="directory for results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
