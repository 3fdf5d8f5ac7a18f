"""Drawing: validation losses of training runs, over the tokens they were trained on.

python -m model.figures.curves OUT.png NAME=RUN_DIR [NAME=RUN_DIR ...]
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from model.figures.canvas import label, new_figure, save_figure
from model.training.report import LOG_FILE


def draw_curves(runs: Sequence[tuple[str, Path]], path: Path) -> Path:
    """Runs are names and directories. Raises ValueError for one without a validated step, OSError without a log."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, directory in runs:
        tokens, losses = read_losses(directory / LOG_FILE)
        axes.plot(tokens, losses, marker=".", label=f"{name}: {losses[-1]:.2f}")
    label(axes, "Validation loss in training", "million tokens trained on", "nats per token")
    return save_figure(figure, path)


def read_losses(path: Path) -> tuple[list[float], list[float]]:
    """Millions of tokens and validation losses, where the log has some. Raises ValueError where it has none."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line.get("validation_loss")]
    if not lines:
        raise ValueError(f"{path}: no step was validated")
    return [int(line["tokens"]) / 1e6 for line in lines], [float(line["validation_loss"]) for line in lines]


def _run(text: str) -> tuple[str, Path]:
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=RUN_DIR")
    return name, Path(directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m model.figures.curves", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("out", metavar="OUT.png", type=Path)
    parser.add_argument("runs", metavar="NAME=RUN_DIR", type=_run, nargs="+", help="directory of a training run")
    options = parser.parse_args(arguments)
    try:
        draw_curves(options.runs, options.out)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
