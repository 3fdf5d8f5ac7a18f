"""How Tessera stands to the best peer in each cell, and to the machine's limit: one table, one file, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.peers.contest import CONTESTS, Contest
from loadtests.report import markdown_table, number
from loadtests.rows import THROUGHPUT, TTFT_P50, TTFT_P95, Metric, Row
from loadtests.watch import Verdict

TARGET_RATIO, TARGET_SHARE = 2.0, 0.8
"""Of throughput: the smaller of so many times the best peer and of that share of the roofline."""
_ABSENT = "–"


@dataclass(frozen=True, slots=True)
class Standing:
    """One cell of one shape and width: our row, and those of the peers that were measured."""

    shape: str
    contest: Contest
    ours: Row
    peers: tuple[Row, ...]

    @property
    def is_clean(self) -> bool:
        return all(row.verdict is Verdict.CLEAN for row in (self.ours, *self.peers))

    def best(self, metric: Metric) -> float | None:
        """The best of the peers; None where none was measured."""
        values = [value for row in self.peers if (value := row.value(metric)) is not None]
        return (max if metric.is_better_high else min)(values, default=None)

    def ratio(self, metric: Metric) -> float | None:
        """Ours over the best peer's: above 1 is better for tokens, below 1 for times."""
        ours, best = self.ours.value(metric), self.best(metric)
        return ours / best if ours is not None and best else None

    @property
    def missed(self) -> list[str]:
        """What falls short of the target, in words of the table; "behind" where a peer is better."""
        found = []
        ratio, share = self.ratio(THROUGHPUT), self.ours.roofline_share
        if ratio is not None and ratio < 1:
            found.append("behind: tok/s")
        elif ratio is not None and ratio < TARGET_RATIO and (share is None or share < TARGET_SHARE):
            found.append(f"tok/s under {TARGET_RATIO:g} × best and {TARGET_SHARE:.0%} of roofline")
        for metric in (TTFT_P50, TTFT_P95):
            ratio = self.ratio(metric)
            if ratio is not None and ratio >= 1:
                found.append(f"behind: {metric.name}")
        return found

    def described(self) -> dict[str, Any]:
        """For a results file."""
        metrics = (THROUGHPUT, TTFT_P50, TTFT_P95)
        return {
            "shape": self.shape,
            "width": self.contest.width,
            "cell": self.ours.cell,
            "servers": {
                row.server: {metric.name: row.value(metric) for metric in metrics} for row in (self.ours, *self.peers)
            },
            "ratios_to_best": {metric.name: self.ratio(metric) for metric in metrics},
            "roofline": self.ours.roofline,
            "roofline_share": self.ours.roofline_share,
            "missed": self.missed,
            "is_clean": self.is_clean,
            "num_failed": sum(row.num_failed for row in (self.ours, *self.peers)),
        }


def standings(shape: str, measured: Sequence[Row]) -> list[Standing]:
    """Every cell of every contest in which we were measured."""
    by_name = {(row.server, row.cell): row for row in measured}
    cells = dict.fromkeys(row.cell for row in measured)
    return [
        Standing(
            shape,
            contest,
            by_name[contest.ours, cell],
            tuple(by_name[peer, cell] for peer in contest.peers if (peer, cell) in by_name),
        )
        for contest in CONTESTS
        for cell in cells
        if (contest.ours, cell) in by_name
    ]


def standings_report(found: Sequence[Standing], missing: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """The Markdown document: who is missing and why, then one line a cell."""
    parts = ["# Tessera and its peers", *(f"**{name} is missing**: {reason}" for name, reason in missing.items())]
    parts += [
        "Output tokens a second, time to first token in milliseconds; `× best` is ours over the best peer's: above 1 "
        "is better for tok/s, below 1 for TTFT. `share` is of our own roofline.",
        standings_table(found),
        *notes,
    ]
    return "\n\n".join(parts) + "\n"


def standings_table(found: Sequence[Standing]) -> str:
    peers = list(dict.fromkeys(peer.removesuffix("-q8_0") for contest in CONTESTS for peer in contest.peers))
    head = ["cell", "weights", "Tessera tok/s", *(f"{peer} tok/s" for peer in peers), "× best", "roofline", "share"]
    head += ["TTFT p50", "best peer's", "× best", "TTFT p95", "best peer's", "× best", "short of the target"]
    return markdown_table(head, [_line(standing, peers) for standing in found])


def _line(standing: Standing, peers: Sequence[str]) -> list[str]:
    ours = standing.ours
    by_peer = {row.server.removesuffix("-q8_0"): number(row.value(THROUGHPUT)) for row in standing.peers}
    mark = "" if standing.is_clean else " (not clean)"
    line = [f"{standing.shape} {ours.cell}{mark}", standing.contest.width, number(ours.value(THROUGHPUT))]
    line += [by_peer.get(peer, _ABSENT) for peer in peers]
    line += [_ratio(standing, THROUGHPUT), number(ours.roofline)]
    line.append(_ABSENT if ours.roofline_share is None else f"{ours.roofline_share:.0%}")
    for metric in (TTFT_P50, TTFT_P95):
        line += [number(ours.value(metric)), number(standing.best(metric)), _ratio(standing, metric)]
    return [*line, "; ".join(standing.missed) or "nothing"]


def _ratio(standing: Standing, metric: Metric) -> str:
    value = standing.ratio(metric)
    return _ABSENT if value is None else f"{value:.2f}"


def save_standings_plot(found: Sequence[Standing], path: Path) -> None:
    """Throughput over the best peer's, a bar a cell. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [(standing, ratio) for standing in found if (ratio := standing.ratio(THROUGHPUT)) is not None]
    figure = Figure(figsize=(8, 1 + 0.3 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = [f"{standing.shape} {standing.contest.width} {standing.ours.cell}" for standing, _ in bars]
    axes.barh(labels, [ratio for _, ratio in bars], color=["C0" if ratio >= 1 else "C3" for _, ratio in bars])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("output tokens per second over the best peer's")
    figure.savefig(path, dpi=120)
