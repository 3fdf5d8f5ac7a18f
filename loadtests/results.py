"""Results on disk: one JSON file with the machine, every cell and every request. Shows nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.cell import CellResult
from loadtests.errors import ResultsError
from loadtests.machine import read_machine
from loadtests.roofline import StepCosts

SCHEMA = 1
FILE_NAME = "results.json"


@dataclass(frozen=True, slots=True)
class Results:
    """A finished run. `cells` are as `CellResult.described` gives them; `notes` are for whoever reads the tables;
    `step_costs` are those of servers of which they are known, by name."""

    created: str
    machine: Mapping[str, Any]
    client: Mapping[str, Any]
    cells: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
    step_costs: Mapping[str, StepCosts] = field(default_factory=dict)
    schema: int = field(default=SCHEMA)

    @classmethod
    def of(
        cls,
        cells: Iterable[CellResult],
        client: Mapping[str, Any],
        notes: Iterable[str] = (),
        *,
        with_events: bool,
        step_costs: Mapping[str, StepCosts] | None = None,
    ) -> Results:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        described = tuple(cell.described(with_events=with_events) for cell in cells)
        return cls(created, read_machine().described(), client, described, tuple(notes), step_costs or {})

    def save(self, directory: Path) -> Path:
        path = directory / FILE_NAME
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path


def load_results(path: Path) -> Results:
    """Reads a results file, or the one in a directory. Raises ResultsError."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: {error}") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ResultsError(f"{path}: not a results file of this version (schema {SCHEMA})")
    try:
        return Results(
            value["created"],
            value["machine"],
            value["client"],
            tuple(value["cells"]),
            tuple(value["notes"]),
            {name: StepCosts.of(costs) for name, costs in value.get("step_costs", {}).items()},
        )
    except (KeyError, TypeError) as error:
        raise ResultsError(f"{path}: {error!r} is missing") from error


def prepare_directory(directory: Path, *, may_overwrite: bool) -> None:
    """Makes the directory before any load is sent. Raises ResultsError where results would be lost."""
    if (directory / FILE_NAME).exists() and not may_overwrite:
        raise ResultsError(f"{directory / FILE_NAME} exists; choose another --out or give --overwrite")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{directory}: {error.strerror}") from error
