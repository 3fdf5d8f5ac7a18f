"""What operators see: metrics that mean what they say, one log line for each exchange."""

from __future__ import annotations

import logging
import pickle
import time

import httpx
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from model.tokenizer import Tokenizer
from service.engine.distribution import Distribution
from service.engine.errors import EngineOverloadedError
from service.engine.request import FinishReason
from service.engine.stats import EngineStats
from service.gateway.settings import GatewaySettings
from service.metrics import SECONDS, TOKEN_SECONDS, GatewayMetrics
from tests.gateway.events import stream_chunks
from tests.gateway.fake_engine import INFO, FakeEngine, hang, say, steps
from tests.gateway.server import GatewayServer, served_model, wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """The samples of a scrape, by name and labels; which gateway tells of them is left out."""

    def __init__(self, client: httpx.Client) -> None:
        answer = client.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        families = list(text_string_to_metric_families(answer.text))
        assert all(family.name.startswith("mosaic_") for family in families)
        self.names = {family.name for family in families}
        self._samples: Samples = {
            (sample.name, frozenset(item for item in sample.labels.items() if item[0] != "gateway")): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self._samples.get(("mosaic_" + name, frozenset(labels.items())), 0.0)


def posts(scrape: Scrape, status: int) -> float:
    """How many completions were answered with this status."""
    return scrape.value("http_requests_total", method="POST", route="/v1/completions", status=str(status))


@pytest.fixture
def fresh(engine: FakeEngine, tokenizer: Tokenizer) -> httpx.Client:
    """Speaks to a server of its own, whose counters begin at zero."""
    with (
        GatewayServer(engine, served_model(tokenizer=tokenizer)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def test_requests_are_counted_and_timed(fresh: httpx.Client, engine: FakeEngine) -> None:
    engine.script = say([5, 6, 7, 8], delay_s=0.02)
    started_s = time.perf_counter()
    fresh.post("/v1/completions", json={"prompt": [1, 2, 3], "n": 2})
    engine.script = say([5, 0], finish=FinishReason.STOP)
    stream_chunks(fresh, {"prompt": [1]})
    took_s = time.perf_counter() - started_s
    scrape = Scrape(fresh)
    assert scrape.value("prompt_tokens_total") == 4
    assert scrape.value("generation_tokens_total") == 10
    assert scrape.value("request_success_total", finished_reason="length") == 2
    assert scrape.value("request_success_total", finished_reason="stop") == 1
    assert scrape.value("request_success_total", finished_reason="error") == 0
    for name, count in (
        ("time_to_first_token_seconds", 3),
        ("e2e_request_latency_seconds", 3),
        ("request_time_per_output_token_seconds", 3),
        ("request_queue_time_seconds", 3),
        ("request_prefill_time_seconds", 3),
        ("request_decode_time_seconds", 3),
        ("request_prompt_tokens", 3),
        ("request_generation_tokens", 3),
        ("inter_token_latency_seconds", 7),
    ):
        assert scrape.value(f"{name}_count") == count, name
    assert scrape.value("request_prefill_time_seconds_sum") == pytest.approx(0.006)
    phases = ("gateway", "queue", "prefill", "decode", "stream")
    assert sum(scrape.value(f"request_{phase}_time_seconds_sum") for phase in phases) == pytest.approx(
        scrape.value("e2e_request_latency_seconds_sum")
    )
    assert scrape.value("request_generation_tokens_sum") == 10
    # Two choices of four tokens 20 ms apart, as exact as timers are; one that took next to nothing.
    assert 0.035 <= scrape.value("time_to_first_token_seconds_sum") <= 2 * took_s
    assert 0.1 <= scrape.value("inter_token_latency_seconds_sum") <= 2 * took_s
    assert 0.033 <= scrape.value("request_time_per_output_token_seconds_sum") <= took_s
    # An exchange is counted when it is over, which a client may know a moment earlier.
    wait_until(lambda: posts(Scrape(fresh), 200) == 2, "both exchanges to be counted")


def test_histograms_resolve_a_millisecond() -> None:
    for buckets in (SECONDS, TOKEN_SECONDS):
        assert list(buckets) == sorted(buckets)
        assert {0.001, 0.002, 0.003} <= set(buckets)


def test_failures_are_counted_by_reason(fresh: httpx.Client, engine: FakeEngine) -> None:
    engine.script = steps(EngineOverloadedError("full"))
    fresh.post("/v1/completions", json={"prompt": [1]})
    fresh.post("/v1/completions", json={"prompt": [1], "foo": 1})
    engine.script = steps([5], FinishReason.ERROR)
    fresh.post("/v1/completions", json={"prompt": [1]})
    scrape = Scrape(fresh)
    assert scrape.value("requests_rejected_total", reason="overloaded") == 1
    assert scrape.value("requests_rejected_total", reason="unknown_parameter") == 1
    assert scrape.value("request_success_total", finished_reason="error") == 1
    wait_until(lambda: posts(Scrape(fresh), 503) == 1, "the 503")
    wait_until(lambda: posts(Scrape(fresh), 400) == 1, "the 400")
    wait_until(lambda: posts(Scrape(fresh), 500) == 1, "the 500")


def test_clients_that_go_away_are_counted(fresh: httpx.Client, engine: FakeEngine) -> None:
    engine.script = hang([5])
    with fresh.stream("POST", "/v1/completions", json={"prompt": [1], "stream": True}) as answer:
        next(answer.iter_lines())
    wait_until(lambda: engine.aborted, "the abort")
    wait_until(lambda: Scrape(fresh).value("requests_cancelled_total") == 1, "the count")
    assert Scrape(fresh).value("request_success_total", finished_reason="abort") == 1


def test_clients_cannot_make_up_labels(fresh: httpx.Client) -> None:
    for path in ("/a", "/b", "/v1/models/a", "/v1/models/b", "/static/x"):
        fresh.get(path)
    fresh.request("BREW", "/v1/models")
    scrape = Scrape(fresh)
    assert scrape.value("http_requests_total", method="GET", route="unmatched", status="404") == 2
    assert scrape.value("http_requests_total", method="GET", route="/v1/models/{model_id:path}", status="404") == 2
    assert scrape.value("http_requests_total", method="GET", route="/static/{name}", status="404") == 1


def test_replicas_are_asked_at_every_scrape(client: httpx.Client, engine: FakeEngine) -> None:
    engine.snapshots = [
        EngineStats(
            "a",
            num_running=3,
            num_waiting=2,
            num_blocks=10,
            num_free_blocks=4,
            num_slots=4,
            num_steps=7,
            by_key=(("ann", 1, 2),),
        ),
        EngineStats(
            "b",
            num_preemptions=5,
            step_time_s=1.5,
            start_up=(("weights", 0.5), ("kernel", 0.25)),
            prefill_steps_s=Distribution((0.001, 0.002), (3, 0, 1), 0.5),
        ),
    ]
    scrape = Scrape(client)
    assert scrape.value("engine_up") == 1
    assert scrape.value("num_engine_replicas") == 2
    assert scrape.value("num_requests_running", replica="a") == 3
    assert scrape.value("num_requests_waiting", replica="a") == 2
    assert scrape.value("queue_depth", replica="a", key="ann") == 2
    assert scrape.value("memory_usage_ratio", replica="a") == pytest.approx(0.6)
    assert scrape.value("memory_usage_ratio", replica="b") == 0
    assert scrape.value("memory_blocks", replica="a", state="used") == 6
    assert scrape.value("memory_blocks", replica="a", state="free") == 4
    assert scrape.value("state_slots", replica="a", state="used") == 4
    assert scrape.value("engine_steps_total", replica="a") == 7
    assert scrape.value("num_preemptions_total", replica="b") == 5
    assert scrape.value("engine_step_seconds_total", replica="b") == 1.5
    assert scrape.value("engine_start_up_seconds", replica="b", phase="kernel") == 0.25
    steps = {"replica": "b", "kind": "prefill"}
    assert scrape.value("engine_step_duration_seconds_bucket", **steps, le="0.001") == 3
    assert scrape.value("engine_step_duration_seconds_bucket", **steps, le="0.002") == 3
    assert scrape.value("engine_step_duration_seconds_bucket", **steps, le="+Inf") == 4
    assert scrape.value("engine_step_duration_seconds_count", **steps) == 4
    assert scrape.value("engine_step_duration_seconds_sum", **steps) == 0.5


class _OnePeer:
    """Another gateway, which has counted a few things."""

    def __init__(self) -> None:
        self.metrics = GatewayMetrics(INFO, "1", "other")
        self.metrics.generation_tokens.inc(100)
        self.is_silent = False

    async def families(self) -> list[list[Metric]]:
        if self.is_silent:
            raise TimeoutError
        return pickle.loads(pickle.dumps([self.metrics.families()]))


def test_any_gateway_answers_for_all(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    peer = _OnePeer()
    served, settings = served_model(tokenizer=tokenizer), GatewaySettings(name="this")
    with (
        GatewayServer(engine, served, settings, peer) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        client.post("/v1/completions", json={"prompt": [1], "max_tokens": 1})
        lines = client.get("/metrics").text.splitlines()
        assert 'mosaic_generation_tokens_total{gateway="this"} 1.0' in lines
        assert 'mosaic_generation_tokens_total{gateway="other"} 100.0' in lines
        assert lines.count("# TYPE mosaic_generation_tokens_total counter") == 1
        assert len([line for line in lines if line.startswith("mosaic_num_requests_running{")]) == 1
        peer.is_silent = True
        lines = client.get("/metrics").text.splitlines()
        assert 'mosaic_generation_tokens_total{gateway="this"} 1.0' in lines


def test_a_scrape_survives_its_engine(client: httpx.Client, engine: FakeEngine) -> None:
    engine.snapshots = ConnectionError("gone")
    scrape = Scrape(client)
    assert scrape.value("engine_up") == 0
    assert "mosaic_http_requests" in scrape.names
    assert "mosaic_build_info" in scrape.names


def test_a_silent_engine_is_told_of_once(
    fresh: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "service.gateway.outage"]

    for outage in range(2):
        engine.snapshots = ConnectionError("gone")
        for path in ("/metrics", "/dashboard/data", "/metrics"):
            fresh.get(path)
        assert len(lines()) == 2 * outage + 1
        assert lines()[-1] == "asking the engine's statistics fails from now on: ConnectionError('gone')"
        engine.snapshots = []
        for _ in range(2):
            fresh.get("/metrics")
        assert len(lines()) == 2 * outage + 2
        assert "works again" in lines()[-1]


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tessera.access"]


def test_one_log_line_tells_an_exchange(
    client: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tessera.access")
    engine.script = say([5, 6])
    body = {"prompt": [1], "user": 'eve" status=200\nid=forged', "seed": 4}
    client.post("/v1/completions?key=secret", json=body, headers={"X-Request-Id": "abc", "Authorization": "secret"})
    wait_until(lambda: access_lines(caplog), "the line")
    [line] = access_lines(caplog)
    assert line.startswith("id=abc method=POST path=/v1/completions status=200 ms=")
    for words in ("model=mosaic", "stream=False", "seed=4", "prompt_tokens=1", "completion_tokens=2", "finish=length"):
        assert words in line
    assert "ttft_ms=" in line
    assert r'user="eve\" status=200\nid=forged"' in line, "one line, whatever the client writes"
    assert "secret" not in line
    [record] = [record for record in caplog.records if record.name == "tessera.access"]
    assert record.fields["user"] == body["user"]  # type: ignore[attr-defined]


def test_probes_do_not_fill_the_log(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tessera.access")
    for path in ("/livez", "/readyz", "/health", "/metrics", "/version"):
        client.get(path)
    wait_until(lambda: access_lines(caplog), "the last line")
    [line] = access_lines(caplog)
    assert "path=/version" in line
