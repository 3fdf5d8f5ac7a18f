"""Results as pictures: throughput and time to first token over the load, a line for each server. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loadtests.rows import THROUGHPUT, TTFT_P50, TTFT_P95, Metric, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_plots(measured: Sequence[Row], directory: Path) -> list[Path]:
    """One picture for each workload and kind of load. Raises ImportError without matplotlib."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        groups.setdefault((row.workload, "rate" if row.concurrency is None else "concurrency"), []).append(row)
    return [_save(workload, axis, group, directory) for (workload, axis), group in groups.items()]


def _save(workload: str, axis: str, group: Sequence[Row], directory: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, server in enumerate(dict.fromkeys(row.server for row in group)):
        own = sorted((row for row in group if row.server == server), key=_load)
        _draw(left, own, THROUGHPUT, server, f"C{i}-")
        _draw(right, own, TTFT_P50, f"{server} p50", f"C{i}-")
        _draw(right, own, TTFT_P95, f"{server} p95", f"C{i}--")
    unit = "requests at a time" if axis == "concurrency" else "requests per second"
    _label(left, f"{workload}: throughput", unit, "output tokens per second")
    _label(right, f"{workload}: time to first token", unit, "milliseconds")
    path = directory / f"{workload}-{axis}.png"
    figure.savefig(path, dpi=120)
    return path


def _draw(axes: Axes, own: Sequence[Row], metric: Metric, label: str, style: str) -> None:
    points = [(_load(row), value) for row in own if (value := row.value(metric)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    if axes.get_lines():
        axes.legend()


def _load(row: Row) -> float:
    return float(row.concurrency if row.concurrency is not None else row.rate or 0)
