"""Signs of life in a stream that has nothing to say, before its first token and later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator

import httpx
import openai
import pytest

from model.tokenizer import Tokenizer
from service.engine.errors import EngineOverloadedError
from service.engine.request import FinishReason, Request, RequestOutput
from service.gateway.heartbeat import Heartbeat
from service.gateway.settings import GatewaySettings
from tests.gateway.events import parse_events
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.server import GatewayServer, served_model, wait_until

COMMENT = ": keep-alive"
BODY = {"prompt": [1], "stream": True}


class Held:
    """A script that does what it does only when told."""

    def __init__(self, *outputs: tuple[int, ...] | Exception) -> None:
        self._outputs = outputs
        self._turns = asyncio.Semaphore(0)

    async def go_on(self) -> None:
        self._turns.release()

    async def __call__(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        for position, output in enumerate(self._outputs, start=1):
            await self._turns.acquire()
            if isinstance(output, Exception):
                raise output
            reason = FinishReason.LENGTH if position == len(self._outputs) else None
            yield RequestOutput(request.request_id, output, reason)


@pytest.fixture
def quick(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[GatewayServer]:
    """A server that soon loses its patience with silence."""
    with GatewayServer(engine, served_model(tokenizer=tokenizer), GatewaySettings(keep_alive_s=0.02)) as server:
        yield server


def comments(lines: Iterator[str], number: int) -> None:
    """Reads so many comments and nothing else."""
    for _ in range(number):
        assert next(lines) == COMMENT
        assert next(lines) == ""


def test_comments_come_before_the_first_token_and_between_tokens(
    quick: GatewayServer, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    held = engine.script = Held(tuple(tokenizer.encode("red")), tuple(tokenizer.encode(" fox")))
    with httpx.stream("POST", quick.url + "/v1/completions", json=BODY, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        comments(lines, 3)
        quick.call(held.go_on())
        texts = [line for line in lines_until(lines, lambda line: "red" in line) if line not in ("", COMMENT)]
        assert len(texts) == 1
        comments(skip_empty(lines), 1)
        quick.call(held.go_on())
        rest = [line for line in lines if line not in ("", COMMENT)]
    assert " fox" in rest[0]
    assert rest[-1] == "data: [DONE]"


def lines_until(lines: Iterator[str], is_last: Callable[[str], bool]) -> Iterator[str]:
    for line in lines:
        yield line
        if is_last(line):
            return


def skip_empty(lines: Iterator[str]) -> Iterator[str]:
    assert next(lines) == ""
    return lines


def test_the_official_client_takes_no_notice(quick: GatewayServer, engine: FakeEngine) -> None:
    held = engine.script = Held((5,), (6,))
    with openai.OpenAI(base_url=quick.url + "/v1", api_key="-", max_retries=0) as client:
        stream = client.completions.create(model="mosaic", prompt="x", stream=True)  # returns after a comment
        quick.call(held.go_on())
        quick.call(held.go_on())
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


def test_a_refusal_after_a_comment_is_an_event(quick: GatewayServer, engine: FakeEngine) -> None:
    held = engine.script = Held(EngineOverloadedError("full"))
    with httpx.stream("POST", quick.url + "/v1/completions", json=BODY, timeout=60) as answer:
        lines = answer.iter_lines()
        comments(lines, 2)
        quick.call(held.go_on())
        rest = [line for line in lines if line != COMMENT and line]
    assert len(rest) == 1
    assert '"code":"overloaded"' in rest[0]
    lines = iter(httpx.get(quick.url + "/metrics").text.splitlines())
    [count] = [line for line in lines if line.startswith("mosaic_requests_rejected_total{") and "overloaded" in line]
    assert count.endswith(" 1.0")


def test_a_client_that_goes_away_while_it_waits_is_noticed(quick: GatewayServer, engine: FakeEngine) -> None:
    engine.script = Held((5,))
    with httpx.stream("POST", quick.url + "/v1/completions", json=BODY, timeout=60) as answer:
        comments(answer.iter_lines(), 1)
    wait_until(lambda: not engine.running, "the engine to be freed")


def test_whole_answers_and_patient_servers_say_nothing(
    quick: GatewayServer, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    async def slow(request: Request) -> AsyncGenerator[RequestOutput, None]:
        await asyncio.sleep(0.1)
        yield RequestOutput(request.request_id, (5,), FinishReason.LENGTH)

    engine.script = slow
    whole = httpx.post(quick.url + "/v1/completions", json=BODY | {"stream": False}, timeout=60)
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    patient = GatewaySettings(keep_alive_s=None)
    with GatewayServer(engine, served_model(tokenizer=tokenizer), patient) as server:
        answer = httpx.post(server.url + "/v1/completions", json=BODY, timeout=60)
    assert parse_events(answer.text)[1]


async def test_a_beat_is_due_after_half_a_period_of_silence_or_more() -> None:
    beats = []
    with Heartbeat(3600, lambda: beats.append(1)) as heartbeat:
        timer = heartbeat._timer
        for _ in range(5):
            heartbeat.sent()
            heartbeat._tick()
            assert not heartbeat.is_due, "it spoke within the last half period"
        heartbeat._tick()
        assert heartbeat.is_due
        assert beats == [1]
        heartbeat.sent()
        assert not heartbeat.is_due
        assert heartbeat._timer is not timer
        timer = heartbeat._timer
    assert timer is not None
    assert timer.cancelled()
