"""A shape that is measured: a model of random weights with a name, Tessera's commands to serve it, and its step costs.

Runs the project's commands, as anybody would; imports nothing of them.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loadtests.errors import LoadTestError

SHAPES = ("small", "gpt2s")
WIDTHS = ("bfloat16", "int8")
"""Of a weight."""
MAX_MODEL_LEN = 1024
COMMAND_TIMEOUT_S = 300.0


class ShapeError(LoadTestError):
    """A model could not be made, or its costs not be told."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A preset of `python -m model.init`, and the directory under which its models are kept."""

    preset: str
    models: Path

    @property
    def model(self) -> Path:
        return self.models.absolute() / self.preset

    def prepare(self) -> None:
        """Makes the model unless it is there. Raises ShapeError."""
        if not (self.model / "config.json").exists():
            self.models.mkdir(parents=True, exist_ok=True)
            run_module("model.init", str(self.model), "--preset", self.preset)

    def write_costs(self, path: Path, width: str) -> None:
        """Measures the machine and writes what `--step-costs` reads. Raises ShapeError."""
        arguments = ["--model", str(self.model), *(("--quantization", "int8") if width == "int8" else ())]
        path.write_text(run_module("model.kernels.roofline", *arguments), encoding="utf-8")

    def tessera(self, width: str, *options: str, max_num_seqs: int, max_model_len: int = MAX_MODEL_LEN) -> str:
        """A command with `{port}` in it that serves the model in one process."""
        weights = ("--quantization", "int8") if width == "int8" else ("--dtype", width)
        return " ".join(
            [
                *(sys.executable, "-m", "service", "serve", "--local", "--model", str(self.model), "--port", "{port}"),
                *("--max-num-seqs", str(max_num_seqs), "--max-model-len", str(max_model_len)),
                *weights,
                *options,
            ]
        )


def run_module(name: str, *arguments: str) -> str:
    """What `python -m name` printed. Raises ShapeError with its last line where it failed."""
    command = [sys.executable, "-m", name, *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ShapeError(f"{name}: {error}") from error
    if done.returncode:
        raise ShapeError(f"{name}: {done.stderr.strip().rpartition(chr(10))[2] or f'exit code {done.returncode}'}")
    return done.stdout
