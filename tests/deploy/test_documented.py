"""The table of panels in docs/observability.md is what the dashboards have.

`TESSERA_UPDATE_DOCS=1 pytest tests/deploy/test_documented.py` writes it anew.
"""

from __future__ import annotations

from pathlib import Path

from deploy.grafana import build
from tests.documented import hold_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"


def table() -> str:
    rows = ["", "| dashboard | panel | |", "| --- | --- | --- |"]
    for name in build.DASHBOARDS:
        for panel in build.dashboard(name)["panels"]:
            rows.append(f"| {name} | {panel['title']} | {panel['description']} |")
    return "\n".join([*rows, "", ""])


def test_every_panel_is_documented() -> None:
    hold_table(PAGE, "panels", table(), "tests/deploy/test_documented.py")
