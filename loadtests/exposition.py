"""Reads numbers out of Prometheus' text format."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def gauge_sum(text: str, name: str, **labels: str) -> float:
    """The sum of all series called `name` that have these labels. Raises KeyError where there is none."""
    values = [value for found, value in _series(text, name) if labels.items() <= found.items()]
    if not values:
        raise KeyError(f"no {name} with {labels} among the metrics")
    return sum(values)


def _series(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    for match in _LINE.finditer(text):
        if match["name"] == name:
            yield dict(_LABEL.findall(match["labels"] or "")), float(match["value"])


def series_values(text: str, name: str) -> list[float]:
    """The value of each series called `name`."""
    return [value for _, value in _series(text, name)]
