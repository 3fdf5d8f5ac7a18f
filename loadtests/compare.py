"""Two results files side by side: the second over the first, cell by cell."""

from __future__ import annotations

from loadtests.errors import ResultsError
from loadtests.report import ratio_table, verdict_line
from loadtests.results import Results
from loadtests.rows import Row, rows

_MACHINE_FIELDS = ("cpu_model", "num_usable_cores", "memory_gib")
_WORKLOAD_FIELDS = ("prompt_tokens", "output_tokens", "shared_prefix_tokens", "num_prefixes", "num_texts")


def compare(
    first: Results, second: Results, *, first_server: str | None = None, second_server: str | None = None
) -> str:
    """A Markdown table of ratios, and what stands against them. Raises ResultsError where nothing can be compared."""
    pairs = _matched(rows(first), rows(second), first_server, second_server)
    lines = [*differences(first, second), *(f"{name}: {verdict_line(own)}" for name, own in _named(pairs))]
    return "\n\n".join(["\n".join(f"- {line}" for line in lines), ratio_table(pairs)]) + "\n"


def differences(first: Results, second: Results) -> list[str]:
    """What makes the two files unequal apart from the servers: the machine, and cells of one name but another shape."""
    found = [
        f"different machines: {name} {first.machine.get(name)} and {second.machine.get(name)}"
        for name in _MACHINE_FIELDS
        if first.machine.get(name) != second.machine.get(name)
    ]
    shapes = [{cell["cell"]: cell["workload"] for cell in results.cells} for results in (first, second)]
    for cell in shapes[0].keys() & shapes[1].keys():
        for name in _WORKLOAD_FIELDS:
            one, other = shapes[0][cell].get(name), shapes[1][cell].get(name)
            if one != other:
                found.append(f"{cell}: {name} {one} and {other}")
    return sorted(found)


def _matched(first: list[Row], second: list[Row], one: str | None, other: str | None) -> list[tuple[Row, Row]]:
    """Rows of one cell: of the servers named, else of the only server on each side, else of servers of one name."""
    first, second = _only(first, one), _only(second, other)
    is_single = all(len({row.server for row in side}) == 1 for side in (first, second))
    pairs = [
        (before, after)
        for before in first
        for after in second
        if before.cell == after.cell and (is_single or before.server == after.server)
    ]
    if not pairs:
        raise ResultsError("the two files have no cell in common; name the servers with --server-a and --server-b")
    return pairs


def _only(side: list[Row], server: str | None) -> list[Row]:
    names = sorted({row.server for row in side})
    if server is not None and server not in names:
        raise ResultsError(f"no server {server!r}; there are {', '.join(names)}")
    return side if server is None else [row for row in side if row.server == server]


def _named(pairs: list[tuple[Row, Row]]) -> list[tuple[str, list[Row]]]:
    return [("A", [before for before, _ in pairs]), ("B", [after for _, after in pairs])]
