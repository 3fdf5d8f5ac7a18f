"""Streams: what comes when, and how they end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from service.engine.errors import EngineDeadError
from service.engine.request import FinishReason, Request, RequestOutput
from tests.gateway.events import finals, parse_events, read_stream, stream_chunks, texts
from tests.gateway.fake_engine import FakeEngine, by_choice, hang, say, steps
from tests.gateway.server import wait_until

STORY = 'The fox 🦊 ran home — "late", she said.\nThe end.'


def test_chunks_look_as_clients_expect(client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = say(tokenizer.encode("red fox"))
    first, *_, last = stream_chunks(client, {"prompt": [1], "seed": 4})
    assert list(first) == ["id", "object", "created", "model", "system_fingerprint", "seed", "choices"]
    assert first["object"] == "text_completion"
    assert (first["model"], first["seed"]) == ("mosaic", 4)
    assert first["choices"] == [
        {"index": 0, "text": "red", "logprobs": None, "finish_reason": None, "stop_reason": None}
    ]
    assert last["choices"][0]["finish_reason"] == "length"
    assert {key: last[key] for key in ("id", "created")} == {key: first[key] for key in ("id", "created")}


def test_usage_comes_last_and_only_when_asked_for(client: httpx.Client, engine: FakeEngine) -> None:
    engine.script = say([5, 6, 7])
    chunks = stream_chunks(client, {"prompt": [1, 2], "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    counts = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert chunks[-1]["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        assert all("usage" not in chunk for chunk in stream_chunks(client, {"prompt": [1], **options}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(
    text=st.text(alphabet="ab €🦊\n", min_size=1, max_size=25),
    stop=st.text(alphabet="ab €🦊\n", min_size=1, max_size=3),
    end=st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]),
)
def test_a_stream_joined_is_the_whole_answer(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer, text: str, stop: str, end: FinishReason
) -> None:
    ids = tokenizer.encode(text)
    engine.reset(say([*ids, 0] if end is FinishReason.STOP else ids, finish=end))
    body = {"prompt": [1], "stop": [stop], "max_tokens": 100, "seed": 1}
    whole = client.post("/v1/completions", json=body).json()
    chunks = stream_chunks(client, {**body, "stream_options": {"include_usage": True}})
    [choice] = whole["choices"]
    assert texts(chunks)[0] == choice["text"] == text.partition(stop)[0]
    final = finals(chunks)[0]
    assert {key: final[key] for key in ("finish_reason", "stop_reason")} == {
        key: choice[key] for key in ("finish_reason", "stop_reason")
    }
    assert chunks[-1]["usage"] == whole["usage"]
    assert "�" not in texts(chunks)[0]


def test_text_of_a_stop_string_never_shows_even_when_it_comes_in_pieces(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    pieces = ["I", " am", " f", "i", "n", "e", " s", "t", "o", "p", " here"]
    engine.script = hang(*[tokenizer.encode(piece) for piece in pieces], delay_s=0.005)
    chunks = stream_chunks(client, {"prompt": [1], "stop": ["fine stop", "never"], "max_tokens": 100})
    assert texts(chunks)[0] == "I am "
    assert finals(chunks)[0]["stop_reason"] == "fine stop"
    # Before the match, everything that could not belong to it was let through at once.
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["I", " am", " ", ""]
    wait_until(lambda: engine.aborted, "the engine to hear of it")


def test_a_stop_string_frees_its_choice_while_the_others_go_on(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = by_choice([hang(tokenizer.encode("the end")), hang([5])])
    body = {"prompt": [1], "n": 2, "stop": "end", "stream": True}
    with client.stream("POST", "/v1/completions", json=body):
        wait_until(lambda: engine.aborted, "the first choice to be aborted")
        assert [request_id[-1] for request_id in engine.aborted] == ["0"]
        assert [request_id[-1] for request_id in engine.running] == ["1"]


def test_the_first_token_is_sent_while_the_second_is_not_yet_there(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = hang(tokenizer.encode("first"))
    with client.stream("POST", "/v1/completions", json={"prompt": [1], "stream": True}) as answer:
        event = next(answer.iter_lines())
        assert json.loads(event.removeprefix("data: "))["choices"][0]["text"] == "first"


def test_outputs_that_wait_are_sent_as_one_event(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("one two three four five")

    async def burst(request: Request) -> AsyncGenerator[RequestOutput, None]:
        for token_id in ids:
            yield RequestOutput(request.request_id, (token_id,))
        await asyncio.sleep(0.05)
        yield RequestOutput(request.request_id, (), FinishReason.LENGTH)

    engine.script = burst
    chunks = stream_chunks(client, {"prompt": [1]})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["one two three four five", ""]


def test_choices_interleave_under_their_own_indices(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    words = ["red fox", "blue bird", "white cat"]
    engine.script = by_choice([say(tokenizer.encode(word), delay_s=0.01) for word in words])
    chunks = stream_chunks(client, {"prompt": [1], "n": 3, "stream_options": {"include_usage": True}})
    assert texts(chunks) == dict(enumerate(words))
    assert set(finals(chunks)) == {0, 1, 2}
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert order != sorted(order), "all were generated at the same time"
    assert chunks[-1]["usage"]["completion_tokens"] == sum(len(tokenizer.encode(word)) for word in words)


@pytest.mark.parametrize(
    "failure", [FinishReason.ERROR, FinishReason.ABORT, EngineDeadError("it died"), RuntimeError("secret.py line 3")]
)
def test_a_failure_in_a_stream_is_one_error_event_and_no_done(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer, failure: FinishReason | Exception
) -> None:
    async def script(request: Request) -> AsyncGenerator[RequestOutput, None]:
        yield RequestOutput(request.request_id, tuple(tokenizer.encode("hello")))
        await asyncio.sleep(0.02)
        async for output in steps(failure)(request):
            yield output

    engine.script = by_choice([script, hang([5])])
    chunks, is_done = read_stream(client, {"prompt": [1], "n": 2})
    assert not is_done
    *text, error = chunks
    assert all("error" not in chunk for chunk in text)
    assert texts(text)[0] == "hello"
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(error)
    wait_until(lambda: not engine.running, "the sibling to be closed")


def test_a_stream_of_a_model_without_a_tokenizer_carries_ids() -> None:
    from tests.gateway.server import GatewayServer, served_model

    engine = FakeEngine(say([5, 6]))
    with GatewayServer(engine, served_model()) as server, httpx.Client(base_url=server.url) as client:
        chunks = stream_chunks(client, {"prompt": [1]})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == [5, 6]
    assert choices[-1]["finish_reason"] == "length"
    assert {choice["text"] for choice in choices} == {""}


def test_a_client_that_reads_late_gets_everything(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("word " * 300)
    engine.script = say(ids)
    body = {"prompt": [1], "max_tokens": 400, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        time.sleep(0.3)
        chunks, is_done = parse_events(answer.read().decode())
    assert is_done
    assert texts(chunks)[0] == tokenizer.decode(ids[:400])
