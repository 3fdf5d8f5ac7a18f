"""Clients that go away and servers that do: nothing is left running, everybody gets an answer."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.gateway.drain import Drain
from service.gateway.errors import DrainingError
from service.gateway.settings import GatewaySettings
from tests.gateway.events import parse_events
from tests.gateway.fake_engine import FakeEngine, chatter, hang, say
from tests.gateway.server import GatewayServer, served_model, wait_until


@pytest.fixture
def own(tokenizer: Tokenizer) -> Iterator[tuple[GatewayServer, FakeEngine, httpx.Client]]:
    """A server that a test may drain."""
    engine = FakeEngine()
    settings = GatewaySettings(drain_grace_s=0.3, drain_retry_after_s=7)
    with (
        GatewayServer(engine, served_model(tokenizer=tokenizer), settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield server, engine, client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [[], [[5]]])
def test_a_client_that_goes_away_frees_the_engine_at_once(
    client: httpx.Client, server: GatewayServer, engine: FakeEngine, stream: bool, before: list[list[int]]
) -> None:
    engine.script = hang(*before)
    connection = socket.create_connection(("127.0.0.1", server.port))
    body = b'{"prompt": [1], "n": 2, "stream": %s}' % (b"true" if stream else b"false")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % len(body) + body)
    wait_until(lambda: len(engine.running) == 2, "both choices to run")
    time.sleep(0.02)
    connection.close()
    wait_until(lambda: not engine.running, "the engine to be freed")
    assert len(engine.aborted) == 2
    wait_until(
        lambda: 'status="499"' in client.get("/metrics").text if not (stream and before) else True, "the log's status"
    )


def test_draining_lets_what_runs_finish_and_refuses_what_is_new(
    own: tuple[GatewayServer, FakeEngine, httpx.Client], tokenizer: Tokenizer
) -> None:
    server, engine, client = own
    drain: Drain = server.app.state.drain
    text = "the quick brown fox jumps over the lazy dog"
    engine.script = say(tokenizer.encode(text), delay_s=0.02)
    answers: list[httpx.Response] = []
    body = {"prompt": [1], "max_tokens": 50}
    running = threading.Thread(
        target=lambda: answers.append(httpx.post(server.url + "/v1/completions", json=body, timeout=60))
    )
    running.start()
    wait_until(lambda: engine.running, "the request to run")
    assert client.get("/readyz").status_code == 200
    drain.begin()
    refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"] == "7"
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
    assert client.get("/livez").status_code == client.get("/health").status_code == 200
    assert server.call(drain.wait_idle(5)) == 0
    running.join()
    assert answers[0].json()["choices"][0]["text"] == text


def test_what_outlasts_the_drain_ends_with_one_error(own: tuple[GatewayServer, FakeEngine, httpx.Client]) -> None:
    server, engine, _ = own
    drain: Drain = server.app.state.drain
    engine.script = hang([5])
    answers: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        body = {"prompt": [1], "stream": stream}
        answers[stream] = httpx.post(server.url + "/v1/completions", json=body, timeout=60)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_until(lambda: drain.num_in_flight == 2 and len(engine.running) == 2, "both to run")
    time.sleep(0.05)
    drain.begin()
    assert server.call(drain.wait_idle(0.05)) == 2
    for thread in threads:
        thread.join()
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["code"] == "draining"
    chunks, is_done = parse_events(answers[True].text)
    assert not is_done
    assert [set(chunk) for chunk in chunks[1:]] == [{"error"}]
    assert chunks[-1]["error"]["code"] == "draining"
    assert not engine.running
    assert drain.num_in_flight == 0


def test_a_client_that_does_not_read_cannot_hold_the_drain(
    own: tuple[GatewayServer, FakeEngine, httpx.Client], tokenizer: Tokenizer
) -> None:
    server, engine, _ = own
    drain: Drain = server.app.state.drain
    longest = max(range(tokenizer.vocab_size), key=lambda token_id: len(tokenizer.token_bytes(token_id)))
    engine.script = chatter(*[longest] * 20_000)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    body = b'{"prompt": [1], "stream": true, "max_tokens": 500}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % len(body) + body)
    wait_until(lambda: engine.running, "the request to run")
    time.sleep(0.5)
    drain.begin()
    started_s = time.monotonic()
    assert server.call(drain.wait_idle(0.05)) == 1
    assert time.monotonic() - started_s > 0.3, "the answer was stuck in the socket: the error could not be sent"
    assert not engine.running
    assert drain.num_in_flight == 0
    connection.close()


async def test_the_drain_counts_and_refuses() -> None:
    drain = Drain(retry_after_s=1, grace_s=0.1)
    assert await drain.wait_idle(0) == 0
    failed: list[Exception] = []
    release = asyncio.Event()

    async def request() -> None:
        with drain.flight(failed.append):
            await release.wait()

    task = asyncio.create_task(request())
    await asyncio.sleep(0)
    assert (drain.num_in_flight, drain.is_draining) == (1, False)
    drain.begin()
    with pytest.raises(DrainingError), drain.flight(failed.append):
        pass
    release.set()
    assert await drain.wait_idle(1) == 0
    await task
    assert failed == []
