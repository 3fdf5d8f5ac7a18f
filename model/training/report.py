"""What a run tells: a CSV file that grows over resumptions, completions to read, and progress on the terminal."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_FILE, SAMPLES_FILE, BOARD = "log.csv", "samples.txt", "tensorboard"


@dataclass(frozen=True)
class Record:
    """One line of the log."""

    step: int
    tokens: int
    epoch: float
    loss: float
    """Nats per token, mean since the last line."""
    gradient_norm: float
    learning_rate: float
    tokens_per_s: float
    seconds: float
    """Time spent in steps since the run's first."""
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None


class Report:
    """Files under the run's directory, and the console. `is_silent` for all processes but the first."""

    def __init__(
        self, directory: Path, steps: int, first_step: int, *, is_silent: bool = False, has_board: bool = False
    ) -> None:
        self._directory, self._is_silent = directory, is_silent
        self._console = Console(stderr=True, quiet=is_silent)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=is_silent or not self._console.is_terminal
        )
        self._task = self._progress.add_task("training", total=steps, completed=first_step)
        self._board = _tensorboard(directory, first_step) if has_board and not is_silent else None
        if not is_silent:
            _drop_after(directory / LOG_FILE, first_step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._board:
            self._board.close()

    def advance(self, step: int, loss: float) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step, description=f"loss {loss:.3f}")

    def log(self, record: Record) -> None:
        """One line in the file, one to read, and points for TensorBoard."""
        if self._is_silent:
            return
        path = self._directory / LOG_FILE
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(field.name for field in fields(Record))
            writer.writerow(
                "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in asdict(record).values()
            )
        if self._board:
            for name, value in asdict(record).items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, record.step)
        self.say(
            f"step {record.step}  epoch {record.epoch:.2f}  loss {record.loss:.4f}  norm {record.gradient_norm:.2f}"
            f"  rate {record.learning_rate:.2e}  {record.tokens_per_s:.0f} tokens/s"
            + (f"  validation {record.validation_loss:.4f}" if record.validation_loss is not None else "")
            + (f"  {record.validation_bits_per_byte:.4f} bits/byte" if record.validation_bits_per_byte else "")
        )

    def sample(self, step: int, prompt: str, completion: str) -> None:
        """Adds a completion to the file."""
        with (self._directory / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{prompt}|{completion}\n")

    def say(self, text: str) -> None:
        """A line on the console."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError("run.tensorboard: needs tensorboardX, which the extra `train` installs") from None
    # What was logged after the state that the run goes on from is not to be shown.
    return SummaryWriter(str(directory / BOARD), purge_step=first_step + 1)


def _drop_after(path: Path, step: int) -> None:
    """Forgets what was logged after the state that the run goes on from: those steps are done again."""
    if not path.exists():
        return
    header, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(header + "".join(line for line in lines if int(line.split(",")[0]) <= step), encoding="utf-8")
