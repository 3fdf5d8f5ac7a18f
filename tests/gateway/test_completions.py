"""Whole answers: their shape, their counts, and what the engine is asked."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.engine.errors import EngineDeadError, EngineOverloadedError, FatalRequestError, RequestRejectedError
from service.engine.request import FinishReason, Request, RequestOutput
from service.gateway.settings import GatewaySettings
from tests.gateway.fake_engine import FakeEngine, by_choice, hang, say, steps
from tests.gateway.server import GatewayServer, served_model, wait_until

STORY = "The fox ran home. It was late."


def complete(client: httpx.Client, **body: object) -> dict:
    answer = client.post("/v1/completions", json={"prompt": "Once upon a time", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_has_every_field_users_read(client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = say(tokenizer.encode(STORY))
    answer = client.post(
        "/v1/completions",
        json={"model": "tales", "prompt": "Once upon a time", "max_tokens": 100, "seed": 7},
        headers={"X-Request-Id": "my-id.1"},
    )
    body = answer.json()
    num_prompt, num_story = len(tokenizer.encode("Once upon a time")), len(tokenizer.encode(STORY))
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "id": "my-id.1",
        "object": "text_completion",
        "model": "tales",
        "choices": [
            {"index": 0, "text": STORY, "logprobs": None, "finish_reason": "length", "stop_reason": None},
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_story,
            "total_tokens": num_prompt + num_story,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "system_fingerprint": "0123456789ab-fake-float32-float32-s2",
        "seed": 7,
    }
    assert answer.headers["x-request-id"] == "my-id.1"


def test_the_engine_is_asked_exactly_what_the_client_asked(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    complete(
        client,
        max_tokens=20,
        min_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=-5,
        stop_token_ids=[7, 8],
        ignore_eos=True,
    )
    [request] = engine.requests
    sampling = request.sampling
    assert request.prompt_token_ids == tuple(tokenizer.encode("Once upon a time"))
    assert request.output_token_ids == ()
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (20, 3, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (0.9, 40, 0.05, -5)
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.choice_index) == ((7, 8), True, 0)


def test_defaults_are_those_users_know(client: httpx.Client, engine: FakeEngine) -> None:
    null = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "stream", "user", "model")
    complete(client)
    complete(client, **dict.fromkeys(null), suffix=None, logprobs=None)
    complete(client, top_k=-1)
    for request in engine.requests:
        sampling = request.sampling
        assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (16, 0, 1.0)
        assert (sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 0, 0.0)
        assert (sampling.stop_token_ids, sampling.ignore_eos) == ((), False)


@pytest.mark.parametrize("seed", [{}, {"seed": -1}])
def test_without_a_seed_a_fresh_one_is_drawn_and_told(
    client: httpx.Client, engine: FakeEngine, seed: dict[str, int]
) -> None:
    told = [complete(client, **seed)["seed"] for _ in range(3)]
    assert told == [request.sampling.seed for request in engine.requests]
    assert len(set(told)) == 3
    assert all(0 <= number < 2**53 for number in told), "exact in a JavaScript number"


def test_an_unset_max_tokens_shrinks_to_what_fits(client: httpx.Client, engine: FakeEngine) -> None:
    complete(client, prompt=[1] * 500)
    complete(client, prompt=[1] * 511)
    complete(client, prompt=[1] * 500, max_tokens=12)
    assert [request.sampling.max_tokens for request in engine.requests] == [12, 1, 12]


def test_many_prompts_and_choices_are_numbered_prompt_by_prompt(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    words = [" red", " green", " blue", " white"]
    engine.script = by_choice([say(tokenizer.encode(word)) for word in words])
    body = complete(client, prompt=["one", "two"], n=2, seed=3)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == list(enumerate(words))
    asked = sorted(engine.requests, key=lambda request: request.request_id)
    assert [request.prompt_token_ids for request in asked] == [
        tuple(tokenizer.encode(prompt)) for prompt in ("one", "one", "two", "two")
    ]
    # A prompt's choices differ; the same prompt asked alone gives the same.
    assert [request.sampling.choice_index for request in asked] == [0, 1, 0, 1]
    assert {request.sampling.seed for request in asked} == {3}
    num_prompt = sum(len(tokenizer.encode(prompt)) for prompt in ("one", "two"))
    num_words = sum(len(tokenizer.encode(word)) for word in words)
    assert body["usage"]["prompt_tokens"] == num_prompt, "each prompt counts once"
    assert body["usage"]["completion_tokens"] == num_words


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]], [[5, 6, 7], [8]]])
def test_prompts_may_be_token_ids(client: httpx.Client, engine: FakeEngine, prompt: list) -> None:
    body = complete(client, prompt=prompt)
    expected = prompt if isinstance(prompt[0], list) else [prompt]
    asked = sorted(engine.requests, key=lambda request: request.request_id)
    assert [list(request.prompt_token_ids) for request in asked] == expected
    assert len(body["choices"]) == len(expected)


def test_special_tokens_typed_by_a_user_are_text(client: httpx.Client, engine: FakeEngine) -> None:
    complete(client, prompt="<|endoftext|>")
    assert 0 not in engine.requests[0].prompt_token_ids


def test_a_stop_string_ends_the_answer_and_frees_the_engine(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(STORY)
    engine.script = hang(*[[token_id] for token_id in ids])
    body = complete(client, stop=["late", "home."], max_tokens=100)
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("The fox ran ", "stop", "home.")
    needed = next(n for n in range(len(ids)) if "home." in tokenizer.decode(ids[:n]))
    assert body["usage"]["completion_tokens"] == needed
    assert engine.aborted == [engine.requests[0].request_id]


def test_stop_tokens_are_told_apart_from_the_end_of_text(
    client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    hello = tokenizer.encode("hello")
    engine.script = say([*hello, 0], finish=FinishReason.STOP)
    [at_end] = complete(client)["choices"]
    assert (at_end["text"], at_end["finish_reason"], at_end["stop_reason"]) == ("hello", "stop", None)
    engine.script = say([*hello, 9], finish=FinishReason.STOP)
    body = complete(client, stop_token_ids=[9])
    assert (body["choices"][0]["text"], body["choices"][0]["stop_reason"]) == ("hello", 9)
    assert body["usage"]["completion_tokens"] == len(hello) + 1


def test_the_same_request_id_twice_is_two_requests_for_the_engine(client: httpx.Client, engine: FakeEngine) -> None:
    for _ in range(2):
        client.post("/v1/completions", json={"prompt": [1]}, headers={"X-Request-Id": "same"})
    assert len({request.request_id for request in engine.requests}) == 2


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (EngineOverloadedError("the queue is full", retry_after_s=2.2), 503, "overloaded", "3"),
        (EngineOverloadedError("the queue is full", retry_after_s=0.0), 503, "overloaded", "1"),
        (EngineDeadError("the engine stopped"), 503, "engine_dead", None),
        (RequestRejectedError("this can never run"), 400, "request_rejected", None),
        (RuntimeError("password=hunter2"), 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_refuses_gives_a_status_stream_or_not(
    client: httpx.Client,
    engine: FakeEngine,
    error: Exception,
    status: int,
    code: str,
    retry_after: str | None,
    stream: bool,
) -> None:
    engine.script = steps(error)
    answer = client.post("/v1/completions", json={"prompt": [1], "stream": stream})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()["error"]
    assert (told["code"], told["param"]) == (code, None)
    assert answer.headers.get("retry-after") == retry_after
    assert "hunter2" not in answer.text
    assert told["message"] == str(error) or status == 500


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_a_failure_during_a_whole_answer_is_a_500_without_its_reason(
    client: httpx.Client, engine: FakeEngine, reason: FinishReason
) -> None:
    engine.script = steps([5, 6], reason)
    answer = client.post("/v1/completions", json={"prompt": [1]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert "secret" not in answer.text


def test_a_request_that_engines_were_lost_to_is_not_to_be_sent_again(client: httpx.Client, engine: FakeEngine) -> None:
    async def script(request: Request) -> AsyncGenerator[RequestOutput, None]:
        yield RequestOutput(request.request_id, (5,))
        yield RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=FatalRequestError.MESSAGE)

    engine.script = script
    answer = client.post("/v1/completions", json={"prompt": [1]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "fatal_request")
    assert answer.headers["x-should-retry"] == "false"


def test_when_one_choice_is_refused_the_others_are_closed(client: httpx.Client, engine: FakeEngine) -> None:
    engine.script = by_choice([hang(), hang([5]), steps(EngineOverloadedError("full"))])
    answer = client.post("/v1/completions", json={"prompt": [1], "n": 3})
    assert answer.status_code == 503
    wait_until(lambda: not engine.running, "the siblings to end")
    assert len(engine.aborted) == 2


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids() -> None:
    engine = FakeEngine(say([5, 6, 0], finish=FinishReason.STOP))
    with (
        GatewayServer(engine, served_model(tokenizer=None)) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        [choice] = complete(client, prompt=[1, 2])["choices"]
        assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("", [5, 6, 0], "stop")
        for body, param in (
            ({"prompt": "text"}, "prompt"),
            ({"prompt": [1], "stop": "x"}, "stop"),
        ):
            answer = client.post("/v1/completions", json=body)
            told = answer.json()["error"]
            assert (answer.status_code, told["param"], told["code"]) == (400, param, "no_tokenizer")
            assert "token ids only" in told["message"]
        assert client.post("/tokenize", json={"prompt": "x"}).json()["error"]["code"] == "no_tokenizer"
        assert client.post("/detokenize", json={"tokens": [1]}).json()["error"]["code"] == "no_tokenizer"


def test_long_texts_are_encoded_off_the_loop_with_the_same_result(tokenizer: Tokenizer) -> None:
    engine = FakeEngine()
    settings = GatewaySettings(threaded_chars=10)
    with (
        GatewayServer(engine, served_model(tokenizer=tokenizer), settings) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        complete(client, prompt=STORY)
    assert engine.requests[0].prompt_token_ids == tuple(tokenizer.encode(STORY))


def test_a_session_is_the_headers_or_the_users(client: httpx.Client, engine: FakeEngine) -> None:
    for headers, user, session in (({}, None, ""), ({}, "me", "me"), ({"X-Session-Id": "s-1"}, "me", "s-1")):
        client.post("/v1/completions", json={"prompt": [1], "user": user, "n": 2}, headers=headers)
        assert [request.session_id for request in engine.requests[-2:]] == [session] * 2
    refused = client.post("/v1/completions", json={"prompt": [1]}, headers={"X-Session-Id": "s" * 257})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-Session-Id")
    assert "at most 256 characters, got 257" in refused.json()["error"]["message"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_names_the_engine_that_gave_it(client: httpx.Client, engine: FakeEngine, is_stream: bool) -> None:
    async def other(request: Request) -> AsyncGenerator[RequestOutput, None]:
        yield RequestOutput(request.request_id, (1,), system_fingerprint="an-updated-engine")
        yield RequestOutput(request.request_id, (2,), FinishReason.LENGTH)

    engine.reset(other)
    answer = client.post("/v1/completions", json={"prompt": [1], "max_tokens": 2, "stream": is_stream})
    parts = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]] if is_stream else [answer.json()]
    assert {part["system_fingerprint"] for part in parts} == {"an-updated-engine"}
