"""Engines and gateways as deployments, by `serve run` and deploy/serve.yaml: HAProxy, two gateways, one engine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from loadtests.server import free_port
from tests.service.ray_processes import processes_of, wait_until_gone
from tests.service.shipped import configuration, environment

START_TIMEOUT_S = 120
REQUEST = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    # Sockets have short paths: pytest's own directories would be too deep.
    directory = Path(tempfile.mkdtemp(prefix="tc-", dir="/tmp"))
    (directory / "proxy").mkdir()
    port = free_port()
    config = configuration(port)
    config["applications"][0]["args"]["debug_endpoints"] = True
    (directory / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(directory / "serve.yaml")]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(directory))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client, process, directory / "log")
            yield client
    finally:
        processes = processes_of(directory)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        wait_until_gone(processes, timeout_s=10)
        shutil.rmtree(directory)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Both gateways have to answer; right after the start HAProxy may close a connection without an answer."""
    deadline = time.monotonic() + START_TIMEOUT_S
    num_in_a_row = 0
    while num_in_a_row < 10:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            num_in_a_row = num_in_a_row + 1 if client.get("/readyz").status_code == 200 else 0
        except httpx.TransportError:
            num_in_a_row = 0
        time.sleep(0.1)


def test_a_stream_is_the_answer_in_pieces(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json=REQUEST | {"stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["text"] for event in events]
    assert len(pieces) > 5
    whole = client.post("/v1/completions", json=REQUEST).json()
    assert "".join(pieces) == whole["choices"][0]["text"]


def test_headers_come_through_the_proxy(client: httpx.Client) -> None:
    for answer in (client.get("/livez"), client.post("/v1/completions", json=REQUEST), client.get("/nowhere")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not {"via", "x-powered-by"} & answer.headers.keys()
        assert answer.headers["cache-control"] == "no-store"
        # Serve listens with a server of its own, which says so.
        assert answer.headers["server"] == "uvicorn"


def test_an_answer_has_one_request_id(client: httpx.Client) -> None:
    for asked, sent, expected in (
        (REQUEST, {}, None),
        (REQUEST, {"x-request-id": "mine-1"}, "mine-1"),
        (REQUEST | {"request_id": "mine-2"}, {"x-request-id": "mine-1"}, "mine-2"),
        (REQUEST, {"x-request-id": "no <id>"}, None),
    ):
        answer = client.post("/v1/completions", json=asked, headers=sent)
        [told] = answer.headers.get_list("x-request-id")
        assert told == answer.json()["id"]
        assert told == expected or (expected is None and "<" not in told)


def test_every_gateway_gives_the_same_answer(client: httpx.Client) -> None:
    url = client.base_url.join("/v1/completions")
    answers = [httpx.post(url, json=REQUEST, timeout=60).json() for _ in range(6)]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


def test_several_prompts_and_choices_of_one_request_are_all_answered(client: httpx.Client) -> None:
    prompts = ["Once upon a time", "The little fox"]
    whole = [client.post("/v1/completions", json=REQUEST | {"prompt": prompt}).json() for prompt in prompts]
    for _ in range(2):
        both = client.post("/v1/completions", json=REQUEST | {"prompt": prompts, "n": 3}).json()
        expected = [answer["choices"][0]["text"] for answer in whole for _ in range(3)]
        assert [choice["text"] for choice in both["choices"]] == expected


def test_errors_keep_their_shape_behind_the_proxy(client: httpx.Client) -> None:
    refused = client.post("/v1/completions", json=REQUEST | {"max_tokens": -1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


def samples(client: httpx.Client) -> dict[str, list[float]]:
    """The values of each metric, whatever its labels: one for each gateway, or replica, that tells of it."""
    values: dict[str, list[float]] = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values.setdefault(name.split("{")[0].removeprefix("mosaic_"), []).append(float(value))
    return values


def test_a_client_that_goes_away_frees_the_engine(client: httpx.Client) -> None:
    request = REQUEST | {"n": 32, "temperature": 1, "max_tokens": 480, "stream": True}
    url = client.base_url.join("/v1/completions")
    with httpx.stream("POST", url, json=request, timeout=60) as stream:
        assert stream.status_code == 200
        next(stream.iter_lines())
    time.sleep(0.5)  # for what was still on its way to the engine
    found = samples(client)
    assert found["num_requests_running"] + found["num_requests_waiting"] == [0, 0]
    assert found["memory_usage_ratio"] == [0]
    assert found["engine_generation_tokens_total"][0] < 32 * 480 / 2


def test_whichever_gateway_answers_a_scrape_it_tells_of_all(client: httpx.Client) -> None:
    def told() -> list[float]:
        return sorted(samples(client)["prompt_tokens_total"])

    before, url = told(), client.base_url.join("/v1/completions")
    assert len(before) == 2, "two gateways"
    for _ in range(6):
        httpx.post(url, json=REQUEST | {"prompt": [1, 2, 3], "max_tokens": 1}, timeout=60)
    after = told()
    assert sum(after) == sum(before) + 18
    assert [told() for _ in range(6)] == [after] * 6


def listed(client: httpx.Client) -> set[str]:
    """All requests in the engine, asked for on a connection of its own: any gateway may get it."""
    [replica] = httpx.get(client.base_url.join("/debug/requests"), timeout=60).json()["replicas"]
    return {state["request_id"] for state in replica["requests"]}


def test_whichever_gateway_is_asked_it_lists_all_that_the_engine_works_on(client: httpx.Client) -> None:
    request = REQUEST | {"n": 32, "temperature": 1, "max_tokens": 480, "stream": True}
    url = client.base_url.join("/v1/completions")
    with httpx.stream("POST", url, json=request, timeout=60) as stream:
        lines = stream.iter_lines()  # kept: a generator that is dropped closes the connection
        next(lines)
        while len(listed(client)) < 32:
            pass  # The first choice may begin before the engine has all.
        told = [listed(client) for _ in range(4)]
        assert [len(names) for names in told] == [32] * 4
        assert {name.split(":")[0] for names in told for name in names} == {stream.headers["x-request-id"]}


def test_options_that_mean_nothing_here_are_refused_by_name() -> None:
    code = "from service.deployment import build; build({'port': 1})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ValueError: not an option in a cluster: port" in done.stderr
