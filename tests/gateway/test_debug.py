"""`/debug/`: a look into an engine that really schedules, while it works."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import httpx
import pytest

from loadtests.exposition import gauge_sum
from service.gateway.settings import GatewaySettings
from tests.gateway.engine_server import CountingRunner, serving
from tests.gateway.server import wait_until

DEBUG = GatewaySettings(has_debug=True, slow_request_s=1e-4)


@pytest.fixture
def runner() -> CountingRunner:
    return CountingRunner(halts=(0, 4))


@pytest.fixture
def client(runner: CountingRunner) -> Iterator[httpx.Client]:
    with serving(runner, DEBUG, max_num_seqs=2) as client:
        yield client


def post(client: httpx.Client, **options: object) -> threading.Thread:
    body = {"prompt": [1, 2, 3], "max_tokens": 10, "ignore_eos": True, **options}
    thread = threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": body})
    thread.start()
    return thread


def states(client: httpx.Client) -> list[dict[str, object]]:
    [replica] = client.get("/debug/requests").json()["replicas"]
    return replica["requests"]


def test_it_is_not_there_unless_asked_for() -> None:
    with serving(CountingRunner()) as client:
        for path in ("/debug/requests", "/debug/timeline"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_who_runs_and_who_waits(client: httpx.Client, runner: CountingRunner) -> None:
    threads = [post(client, request_id=f"r{i}") for i in range(3)]
    wait_until(lambda: num_in_the_engine(client) == 3, "three requests")
    runner.go_on()
    wait_until(lambda: runner.is_halted_at(4), "the engine to halt")
    found = states(client)
    assert [state["phase"] for state in found] == ["decode", "decode", "queue"]
    running, waiting = found[:2], found[2]
    assert all(state["num_output_tokens"] in (3, 4) and state["num_blocks"] > 0 for state in running)
    assert waiting["num_output_tokens"] == waiting["num_blocks"] == 0
    assert {str(state["request_id"]).split(":")[0] for state in found} == {"r0", "r1", "r2"}
    for state in found:
        spent_s = state["queued_s"] + state["prefill_s"] + state["decode_s"]  # type: ignore[operator]
        assert spent_s == pytest.approx(state["age_s"])
    tiles = client.get("/dashboard/data").json()["replicas"][0]["tiles"]
    assert sorted(set(tiles)) == [".", "a", "b"]
    assert len(tiles) - tiles.count(".") == sum(state["num_blocks"] for state in running)  # type: ignore[misc]
    runner.go_on()
    for thread in threads:
        thread.join()
    assert states(client) == []


def num_in_the_engine(client: httpx.Client) -> float:
    text = client.get("/metrics").text
    return gauge_sum(text, "mosaic_num_requests_running") + gauge_sum(text, "mosaic_num_requests_waiting")


def test_the_timeline_is_a_trace_of_steps_and_requests(client: httpx.Client, runner: CountingRunner) -> None:
    runner.go_on()
    first = post(client, request_id="first")
    wait_until(lambda: runner.is_halted_at(4), "the engine to halt")
    runner.go_on()
    first.join()
    post(client, request_id="second", max_tokens=2).join()
    answer = client.get("/debug/timeline?seconds=60")
    assert "timeline.json" in answer.headers["content-disposition"]
    events = answer.json()["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    steps = [span for span in spans if span.get("cat") == "step"]
    assert len(steps) == runner.num_steps == 12
    assert [step["name"] for step in steps] == ["prefill", *["decode"] * 9, "prefill", "decode"]
    assert sum(step["args"]["tokens"] for step in steps) == runner.num_absorbed
    assert sum(step["args"]["prompt_tokens"] for step in steps) == 6
    for whole, names in (("step", ["schedule", "forward", "book"]), ("request", ["queue", "prefill", "decode"])):
        outer = [span for span in spans if span.get("cat") == whole]
        for span in outer:
            inner = [s for s in spans if s["tid"] == span["tid"] and s["name"] in names and is_inside(s, span)]
            assert [s["name"] for s in inner] == names
            assert sum(s["dur"] for s in inner) == span["dur"]
    requests = {span["name"].split(":")[0]: span for span in spans if span.get("cat") == "request"}
    assert requests["first"]["args"]["output_tokens"] == 10
    assert requests["first"]["tid"] == requests["second"]["tid"], "one after the other: one track"
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"engine 0", "steps", "requests 1"}
    assert client.get("/debug/timeline?seconds=0.001").json()["traceEvents"][2:] == []


def is_inside(inner: dict[str, float], outer: dict[str, float]) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


@pytest.mark.parametrize("query", ["seconds=0", "seconds=x", "seconds=nan", "seconds=601", "second=1"])
def test_a_bad_query_is_refused_by_name(client: httpx.Client, runner: CountingRunner, query: str) -> None:
    answer = client.get(f"/debug/timeline?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0]


def test_a_slow_request_is_logged_with_its_phases(
    client: httpx.Client, runner: CountingRunner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "tessera.slow")
    runner.go_on()
    thread = post(client, request_id="snail", max_tokens=3)
    thread.join()
    wait_until(lambda: any("snail" in record.getMessage() for record in caplog.records), "the warning")
    [record] = [record for record in caplog.records if "snail" in record.getMessage()]
    assert {"queue_ms", "prefill_ms", "decode_ms", "ttft_ms", "ms"} <= record.fields.keys()  # type: ignore[attr-defined]
