"""The table of metrics in docs/observability.md is what a server exports.

`TESSERA_UPDATE_DOCS=1 pytest tests/gateway/test_documented.py` writes it anew.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.engine.stats import EngineStats
from tests.documented import hold_table
from tests.gateway.fake_engine import FakeEngine

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"


def table(scrape: str) -> str:
    rows = ["", "| metric | type | labels | |", "| --- | --- | --- | --- |"]
    for family in sorted(text_string_to_metric_families(scrape), key=lambda family: family.name):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        words = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {family.type} | {words} | {family.documentation} |")
    return "\n".join([*rows, "", ""])


def test_every_metric_is_documented(client: httpx.Client, engine: FakeEngine) -> None:
    engine.snapshots = [EngineStats("0", start_up=(("weights", 1.0),))]
    client.get("/version")  # so that some exchange has been counted
    scrape = client.get("/metrics").text
    hold_table(PAGE, "metrics", table(scrape), "tests/gateway/test_documented.py")
