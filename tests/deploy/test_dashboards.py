"""Every Grafana panel, and every rule, in a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.grafana import build
from loadtests.server import free_port
from tests.gateway.server import wait_until
from tests.service.process import ServerProcess

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PANELS = [(name, panel) for name in build.DASHBOARDS for panel in build.dashboard(name)["panels"]]
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
RECORDS = {rule["record"] for rule in RULES if "record" in rule}
KEYS = {"ann": "key-of-ann-0123456789", "ben": "key-of-ben-0123456789", "ops": "key-of-ops-0123456789"}


def find_tool(name: str) -> str:
    """The path of a program of Prometheus. Skips the test without it, unless TESSERA_REQUIRE_PROMETHEUS=1."""
    if path := shutil.which(name):
        return path
    reason = f"no {name} on this machine"
    if os.environ.get("TESSERA_REQUIRE_PROMETHEUS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class Load:
    """Asks a server again and again under two keys, and counts what it is told of the work done."""

    url: str

    def __post_init__(self) -> None:
        self.num_requests = self.num_prompt_tokens = self.num_tokens = 0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(key,)) for key in ("ann", "ben", "ben")]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, key: str) -> None:
        headers = {"Authorization": f"Bearer {KEYS[key]}"}
        body = {"prompt": "Once upon a time there was a fox.", "max_tokens": 24, "ignore_eos": True}
        with httpx.Client(base_url=self.url, headers=headers, timeout=60) as client:
            while not self._is_over.wait(0.05):
                usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
                with self._lock:
                    self.num_requests += 1
                    self.num_prompt_tokens += usage["prompt_tokens"]
                    self.num_tokens += usage["completion_tokens"]


class Prometheus:
    """A Prometheus that scrapes one target every second, with the rules of `deploy/`."""

    def __init__(self, directory: Path, target: str) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / "rules.yml")]
        [scrape] = config["scrape_configs"]
        scrape["static_configs"] = [{"targets": [target]}]
        scrape["authorization"] = {"credentials": KEYS["ops"]}
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self._log = (directory / "log").open("wb")
        self.process = subprocess.Popen(
            [
                *(find_tool("prometheus"), f"--config.file={directory / 'prometheus.yml'}"),
                *(f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def close(self) -> None:
        self._client.close()
        self.process.terminate()
        self.process.wait(timeout=60)
        self._log.close()

    def get(self, path: str, **params: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The samples of an instant query."""
        result = self.get("query", query=expression.replace("$__rate_interval", "10s"))["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in result]

    def value(self, expression: str) -> float:
        """The first value of an instant query; NaN where there is none."""
        try:
            values = self.values(expression)
        except (httpx.TransportError, ValueError):  # not there yet, or not ready
            return math.nan
        return values[0][1] if values else math.nan


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Load]]:
    directory = tmp_path_factory.mktemp("prometheus")
    find_tool("prometheus")
    keys = [{"id": name, "key": key, "admin": name == "ops"} for name, key in KEYS.items()]
    (directory / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    (directory / "keys.yaml").chmod(0o600)
    options = ("--local", "--threads", "1", "--api-key-file", str(directory / "keys.yaml"))
    with ServerProcess(*options) as server:
        load = Load(server.url)
        prometheus = Prometheus(directory, server.url.removeprefix("http://"))
        try:
            # The longest wait: two scrapes for a rate, the rules, and a rule made of rules.
            recorded = 'count(count by (__name__) ({__name__=~"mosaic:.+"}))'
            wait_until(lambda: prometheus.value(recorded) == len(RECORDS), "the rules")
            wait_until(lambda: prometheus.value("sum(rate(mosaic_key_requests_total[10s]))") > 0, "rates")
            yield prometheus, load
        finally:
            load.stop()
            prometheus.close()


@pytest.mark.parametrize(
    ("dashboard", "panel"), PANELS, ids=[f"{name}-{panel['id']}-{panel['title']}" for name, panel in PANELS]
)
def test_no_panel_is_empty(loaded: tuple[Prometheus, Load], dashboard: str, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        values = loaded[0].values(target["expr"])
        assert values, f"nothing for {target['expr']}"
        # Of a histogram only busy labels have percentiles, such as routes that somebody asks for.
        if "by (le, " not in target["expr"]:
            assert not any(math.isnan(value) for _, value in values), f"{values} for {target['expr']}"
        assert any(not math.isnan(value) for _, value in values), f"{values} for {target['expr']}"


def test_panels_by_key_tell_the_keys_apart(loaded: tuple[Prometheus, Load]) -> None:
    by_key = {labels["key"]: value for labels, value in loaded[0].values(build.rate("key_requests_total", "key"))
              if "key" in labels}  # fmt: skip
    assert by_key["ann"] > 0
    assert by_key["ben"] > 0


def test_every_rule_can_be_evaluated(loaded: tuple[Prometheus, Load]) -> None:
    rules = [rule for group in loaded[0].get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 15
    for rule in rules:
        assert rule["health"] == "ok", f"{rule['name']}: {rule.get('lastError')}"
        assert rule["type"] == "recording" or rule["state"] == "inactive", f"{rule['name']} fires in peace"


def test_in_the_end_prometheus_has_counted_what_the_client_has(loaded: tuple[Prometheus, Load]) -> None:
    """Last in this file: it ends the load."""
    prometheus, load = loaded
    load.stop()
    wait_until(
        lambda: prometheus.value("sum(mosaic_generation_tokens_total)") == load.num_tokens, "the last scrape", 30
    )
    assert prometheus.value("sum(mosaic_prompt_tokens_total)") == load.num_prompt_tokens
    assert prometheus.value("sum(mosaic_key_prompt_tokens_total)") == load.num_prompt_tokens
    assert prometheus.value("sum(mosaic_engine_generation_tokens_total)") == load.num_tokens
    computed, saved = "sum(mosaic_engine_prompt_tokens_total)", "sum(mosaic_prefix_cache_hits_total)"
    assert prometheus.value(f"{computed} + {saved}") == load.num_prompt_tokens
    for count in (
        "sum(mosaic_request_success_total)",
        'mosaic_request_success_total{finished_reason="length"}',
        "mosaic_e2e_request_latency_seconds_count",
        "mosaic_time_to_first_token_seconds_count",
        "sum(mosaic_key_requests_total)",
        'mosaic_http_requests_total{route="/v1/completions", status="200"}',
    ):
        assert prometheus.value(count) == load.num_requests, count
    phases = " + ".join(f"mosaic_request_{phase}_time_seconds_sum" for phase in build.PHASES)
    whole = prometheus.value("mosaic_e2e_request_latency_seconds_sum")
    assert prometheus.value(phases) == pytest.approx(whole, rel=1e-6)


def test_rules_do_what_their_tests_say() -> None:
    command = [find_tool("promtool"), "test", "rules", "rules_test.yml"]
    done = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    alerts = {rule["alert"] for rule in RULES if "alert" in rule}
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case.get("exp_alerts")}
    quiet = {
        case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if "exp_alerts" not in case
    }
    assert fired == alerts, "each has to fire where it should"
    assert quiet == alerts, "and to be silent where it should"


def test_the_provisioned_files_are_those_that_were_built() -> None:
    for name in build.DASHBOARDS:
        written = (DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text(encoding="utf-8")
        assert written == build.text(name), "run python -m deploy.grafana.build"
        for panel in json.loads(written)["panels"]:
            assert panel["description"]
