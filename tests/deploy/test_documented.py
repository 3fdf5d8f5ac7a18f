"""The table of panels in docs/observability.md is what the dashboards have.

`TESSERA_UPDATE_DOCS=1 pytest tests/deploy/test_documented.py` writes it anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from deploy.grafana import build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"
_TABLE = re.compile(r"(<!-- panels: .*? -->\n)(.*?)(<!-- end of panels -->)", re.DOTALL)


def table() -> str:
    rows = ["", "| dashboard | panel | |", "| --- | --- | --- |"]
    for name in build.DASHBOARDS:
        for panel in build.dashboard(name)["panels"]:
            rows.append(f"| {name} | {panel['title']} | {panel['description']} |")
    return "\n".join([*rows, "", ""])


def test_every_panel_is_documented() -> None:
    text = PAGE.read_text(encoding="utf-8")
    updated = _TABLE.sub(lambda match: match[1] + table() + match[3], text)
    if os.environ.get("TESSERA_UPDATE_DOCS"):
        PAGE.write_text(updated, encoding="utf-8")
        return
    assert text == updated, "run TESSERA_UPDATE_DOCS=1 pytest tests/deploy/test_documented.py"
