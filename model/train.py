"""Trains a network on text: from a recipe to a model directory that can be served.

    python -m model.train CONFIG [section.key=value ...]
    torchrun --nproc-per-node N -m model.train CONFIG ...

The same command goes on where a run was stopped: interrupt it, or let it be killed, at any time.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from model.training.loop import STATE, Trainer, tokens_directory
from model.training.processes import Processes, joined
from model.training.recipe import Recipe, load_recipe
from model.training.state import has_state
from model.training.tokens import PackedTokens, open_packed, pack


@dataclass
class Stop:
    """Whether the run was asked to end."""

    is_asked: bool = False


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask the run to end, once; the second time it ends at once."""
    stop = Stop()

    def ask(number: int, frame: object) -> None:  # noqa: ARG001
        stop.is_asked = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(recipe: Recipe, stop: Stop) -> bool:
    """Runs the recipe to its end, or until it is asked to stop. Whether it came to the end."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    with joined() as processes:
        trainer = Trainer(recipe, _packed(recipe, processes), processes)
        return trainer.run(lambda: stop.is_asked)


def _packed(recipe: Recipe, processes: Processes) -> PackedTokens:
    directory = tokens_directory(recipe)
    if processes.is_first:
        pack(recipe.data, directory, is_final=has_state(recipe.run.directory / STATE))
    processes.wait()
    return open_packed(directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the recipe, a YAML file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="instead of the recipe's: training.steps=100")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 0 at the end, 130 when stopped before, 2 after one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        with stop_on_signal() as stop:
            return 0 if train(load_recipe(options.config, options.overrides), stop) else 130
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
