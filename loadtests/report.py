"""Results as Markdown: what was measured, and ratios between servers. Says first whether the run may be believed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loadtests.results import Results
from loadtests.rows import CLIENT_COST, LATENCIES, REQUESTS, THROUGHPUT, TTFT_P50, TTFT_P95, Metric, Row, rows
from loadtests.watch import Verdict

RATIOS = (THROUGHPUT, *LATENCIES)
ABSENT = "–"


def report(results: Results) -> str:
    """The whole document."""
    measured = rows(results)
    parts = [
        f"# Load test, {results.created}",
        _machine(results),
        verdict_line(measured),
        *_bullets(results.notes),
        measured_table(measured),
    ]
    servers = list(dict.fromkeys(row.server for row in measured))
    if len(servers) > 1:
        parts += [f"## Ratios to {servers[0]}", ratio_table(_pairs(measured, servers))]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_line(measured: Sequence[Row]) -> str:
    """Whether the machine was quiet, and in which cells it was not."""
    lines = []
    for verdict, sentence in (
        (Verdict.DISTURBED, "**Disturbed**: other work used the machine; these are not clean results."),
        (Verdict.UNVERIFIED, "**Unverified**: whether other work used the machine could not be told."),
    ):
        cells = [f"{row.server} {row.cell}" for row in measured if row.verdict is verdict]
        if cells:
            lines.append(f"{sentence} Cells: {', '.join(cells)}.")
    return " ".join(lines) or "Clean: nothing but the server and this client used the machine."


def measured_table(measured: Sequence[Row]) -> str:
    """One line a server and cell; times in milliseconds, medians of the rounds, lowest and highest in brackets.

    Beside what was measured the roofline and the share of it, where a server's costs are known.
    """
    head = ["cell", "server", "tok/s", "req/s", *(metric.name for metric in LATENCIES)]
    head += ["good", "requests", "failed", "short", CLIENT_COST.name, "other cores", "verdict"]
    lines = [_measured_line(row) for row in measured]
    if any(row.roofline is not None for row in measured):
        head[3:3] = ["roofline", "share"]
        for line, row in zip(lines, measured, strict=True):
            line[3:3] = [number(row.roofline), ABSENT if row.roofline_share is None else f"{row.roofline_share:.0%}"]
    return markdown_table(head, lines)


def ratio_table(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Each second row of a pair over its first. Above 1 is better for tok/s, below 1 for every time."""
    head = ["cell", "servers", "tok/s", "TTFT p50 ms", "TTFT p95 ms", *(f"{metric.name} ratio" for metric in RATIOS)]
    lines = []
    for base, other in pairs:
        values = [_both(base, other, metric) for metric in (THROUGHPUT, TTFT_P50, TTFT_P95)]
        ratios = [_ratio(base, other, metric) for metric in RATIOS]
        lines.append([_marked(base, other), f"{base.server} → {other.server}", *values, *ratios])
    return markdown_table(head, lines)


def _pairs(measured: Sequence[Row], servers: Sequence[str]) -> list[tuple[Row, Row]]:
    by_name = {(row.cell, row.server): row for row in measured}
    cells = dict.fromkeys(row.cell for row in measured)
    return [
        (by_name[cell, servers[0]], by_name[cell, server])
        for cell in cells
        for server in servers[1:]
        if (cell, servers[0]) in by_name and (cell, server) in by_name
    ]


def _measured_line(row: Row) -> list[str]:
    cells = [row.cell, row.server, _with_spread(row, THROUGHPUT), number(row.value(REQUESTS))]
    cells += [number(row.value(metric)) for metric in LATENCIES]
    cells.append(ABSENT if row.goodput_share is None else f"{row.goodput_share:.0%}")
    cells += [str(row.num_requests), str(row.num_failed), str(row.num_short)]
    other = ABSENT if row.other_cores is None else f"{row.other_cores:.2f}"
    return [*cells, number(row.value(CLIENT_COST)), other, row.verdict.value]


def _marked(base: Row, other: Row) -> str:
    is_clean = base.verdict is other.verdict is Verdict.CLEAN
    return base.cell if is_clean else f"{base.cell} (not clean)"


def _with_spread(row: Row, metric: Metric) -> str:
    spread = row.spread(metric)
    value = number(row.value(metric))
    return value if spread is None else f"{value} ({number(spread[0])}–{number(spread[1])})"


def _both(base: Row, other: Row, metric: Metric) -> str:
    return f"{number(base.value(metric))} → {number(other.value(metric))}"


def _ratio(base: Row, other: Row, metric: Metric) -> str:
    before, after = base.value(metric), other.value(metric)
    return ABSENT if not before or after is None else f"{after / before:.2f}"


def number(value: float | None) -> str:
    """Three significant digits, and every digit of what is above a thousand."""
    if value is None:
        return ABSENT
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _machine(results: Results) -> str:
    machine = results.machine
    flags = f" ({', '.join(machine['cpu_flags'])})" if machine["cpu_flags"] else ""
    return (
        f"{machine['num_usable_cores']} of {machine['num_cores']} cores of {machine['cpu_model']}{flags}, "
        f"{machine['memory_gib']} GiB, {machine['kernel']}. "
        f"Client: Python {machine['python']}, {results.client.get('event_loop', 'asyncio')}, on the same machine. "
        "Times in milliseconds; ITL is the gap between events with text."
    )


def _bullets(lines: Iterable[str]) -> list[str]:
    text = "\n".join(f"- {line}" for line in lines)
    return [text] if text else []


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The first two columns to the left, numbers to the right."""
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))
