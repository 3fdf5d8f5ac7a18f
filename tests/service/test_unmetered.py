"""What the measurement of recording's cost switches off and repeats: all that records, and once as often as asked."""

from __future__ import annotations

import signal
import sys

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.server import wait_until
from tests.service.process import ServerProcess

COMMAND = (sys.executable, "-m", "tests.service.unmetered", "2", "serve")
# What policy itself counts, the time without work, and scrapes.
KEPT = ("mosaic_prefix_cache", "mosaic_engine_idle", "mosaic_http_requests", "mosaic_http_request_duration")


def recorded(client: httpx.Client) -> dict[tuple[str, str], float]:
    """All that has been counted or timed of completions; nothing while recording is off."""
    return {
        (sample.name, str(sample.labels)): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if not sample.name.startswith(KEPT) or sample.labels.get("route") == "/v1/completions"
    }


def test_nothing_is_recorded_while_it_is_off() -> None:
    body = {"prompt": [300, 301, 302], "max_tokens": 5, "ignore_eos": True}
    options = ("--local", "--threads", "1", "--no-prefix-cache")
    with ServerProcess(*options, command=COMMAND) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        client.post("/v1/completions", json=body)
        wait_until(lambda: not client.get("/readyz").is_error, "readiness")
        before = recorded(client)
        assert before["mosaic_engine_steps_total", "{'replica': '0'}"] == 2 * 5
        totals = {name: value for (name, _), value in before.items()}
        assert totals["mosaic_generation_tokens_total"] == 2 * 5
        assert totals["mosaic_e2e_request_latency_seconds_count"] == 2
        server.signal(signal.SIGUSR1)
        wait_until(lambda: not recorded(client), "recording to stop")
        client.post("/v1/completions", json=body)
        client.get("/readyz")
        server.signal(signal.SIGUSR2)
        wait_until(lambda: recorded(client), "recording to start")
        assert recorded(client) == before
        client.post("/v1/completions", json=body)
        after = recorded(client)
    unchanged = {name for name, _ in before} - {name for (name, labels), n in after.items() if n > before[name, labels]}
    assert not {"mosaic_e2e_request_latency_seconds_count", "mosaic_engine_steps_total"} & unchanged
