"""The parts of a Grafana dashboard: queries in PromQL, and panels that show them.

A gateway tells of every engine replica, and several gateways may be scraped: so every query first takes one of what
several targets tell of the same thing (`max without (instance)`) and only then sums.
"""

from __future__ import annotations

from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
STACKED = {"stacking": {"mode": "normal"}, "fillOpacity": 40}
"""Options of a panel whose series add up to something."""

Query = tuple[str, str]
"""An expression and the legend of its series."""


def rate(metric: str, *by: str) -> str:
    """What a counter grows by a second, summed but for the labels `by`."""
    return _sum(f"rate(mosaic_{metric}[$__rate_interval])", by)


def now(metric: str, *by: str) -> str:
    """A gauge, summed but for the labels `by`."""
    return _sum(f"mosaic_{metric}", by)


def quantile(q: float, histogram: str, *by: str) -> str:
    """A percentile of what was observed lately."""
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'le', *by)})"


def mean(histogram: str, *by: str) -> str:
    """The mean of what was observed lately; 0 where nothing was."""
    return share(rate(f"{histogram}_sum", *by), rate(f"{histogram}_count", *by))


def share(part: str, whole: str) -> str:
    """A ratio that is 0 where nothing happened."""
    return f"{part} / clamp_min({whole}, 1e-9)"


def _sum(expression: str, by: tuple[str, ...]) -> str:
    grouping = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{grouping} (max without (instance) ({expression}))"


def percentiles(histogram: str) -> list[Query]:
    return [(quantile(q, histogram), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)]


def panel(
    title: str,
    queries: list[Query],
    unit: str,
    description: str,
    *,
    kind: str = "timeseries",
    width: int = 8,
    height: int = 8,
    **custom: Any,
) -> dict[str, Any]:
    """A panel without a place. `custom` are Grafana's own field options."""
    targets = [
        {"datasource": DATASOURCE, "expr": expr, "legendFormat": legend, "refId": chr(ord("A") + index)}
        | ({"format": "heatmap"} if kind == "heatmap" else {"instant": True} if kind in ("stat", "table") else {})
        for index, (expr, legend) in enumerate(queries)
    ]
    defaults: dict[str, Any] = {"unit": unit, "min": 0, "custom": custom}
    if kind == "stat":
        steps = custom.pop("steps", [(None, "green")])
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in steps]}
    return {
        "title": title,
        "description": description,
        "type": kind,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(kind),
        "gridPos": {"w": width, "h": height},
    }


def _options(kind: str) -> dict[str, Any]:
    if kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    if kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": "short"}, "color": {"scheme": "Blues", "mode": "scheme"}}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}


def stat(title: str, expr: str, unit: str, description: str, *steps: tuple[float | None, str]) -> dict[str, Any]:
    """One number; `steps` are its thresholds and their colours."""
    return panel(
        title, [(expr, "")], unit, description, kind="stat", width=4, height=4, steps=list(steps) or [(None, "green")]
    )


def heatmap(title: str, histogram: str, unit: str, description: str) -> dict[str, Any]:
    return panel(title, [(rate(f"{histogram}_bucket", "le"), "{{le}}")], unit, description, kind="heatmap", width=12)
