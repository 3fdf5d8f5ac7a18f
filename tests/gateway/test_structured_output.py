"""Structured output over the shipped model, a small writer of stories: whatever it would rather say, it fits."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.events import finals, read_stream, stream_chunks, texts
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.server import GatewayServer, served_model
from tests.grammars import small_schemas

Json = dict[str, Any]
PROMPT = "Tell me of a fox as JSON: "
# As people write them: all that a text may be long for is bounded.
PERSON: Json = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
        "email": {"anyOf": [{"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}[.]com$"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"enum": ["red", "sly", "quick"]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/Place"},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "maxLength": 12},
                "zip": {"type": "string", "pattern": "^\\d{5}$"},
            },
            "required": ["town"],
            "additionalProperties": False,
        }
    },
}
SHAPE: Json = {
    "oneOf": [
        {
            "type": "object",
            "properties": {
                "kind": {"const": "circle"},
                "radius": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 99},
            },
            "required": ["kind", "radius"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"kind": {"const": "label"}, "text": {"type": "string", "maxLength": 9}},
            "required": ["kind", "text"],
            "additionalProperties": False,
        },
    ]
}
SUM = """
root ::= term ([-+*] term)*
term ::= [1-9] [0-9]{0,2} | "(" root ")"
"""


def ask(client: httpx.Client, **body: object) -> Json:
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 300, **body})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return dict(choice)


def wrapped(schema: Json) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
@pytest.mark.parametrize("schema", [PERSON, SHAPE], ids=["person", "shape"])
def test_json_follows_its_schema(real: httpx.Client, schema: Json, temperature: float) -> None:
    choice = ask(real, response_format=wrapped(schema), temperature=temperature, seed=3)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    jsonschema.validate(json.loads(choice["text"]), schema)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=small_schemas, temperature=st.sampled_from([0, 1.2]), seed=st.integers(0, 2**31))
def test_any_small_schema_is_followed(real: httpx.Client, schema: Json, temperature: float, seed: int) -> None:
    choice = ask(real, structured_outputs={"json": schema}, temperature=temperature, seed=seed, max_tokens=400)
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["text"]), schema)


@pytest.mark.parametrize("pattern", [r"\d{3}-\d{4}", r"(The|A) [a-z]{3,8} (ran|sat)\.", r"\w{2,6}@\w{2,6}\.com"])
def test_a_regular_expression_is_matched_whole(real: httpx.Client, pattern: str) -> None:
    for seed in range(3):
        choice = ask(real, structured_outputs={"regex": pattern}, seed=seed, temperature=1.3)
        assert re.fullmatch(pattern, choice["text"])
        assert choice["finish_reason"] == "stop"


def test_one_of_several_texts(real: httpx.Client) -> None:
    options = ["yes", "no", "na\u00efve \U0001f98a", "no way"]
    seen = {ask(real, structured_outputs={"choice": options}, seed=seed, temperature=5)["text"] for seed in range(12)}
    assert seen <= set(options)
    assert len(seen) > 1


def test_a_context_free_grammar(real: httpx.Client) -> None:
    for seed in range(3):
        choice = ask(real, grammar=SUM, seed=seed, max_tokens=100, stop_token_ids=[])
        if choice["finish_reason"] == "stop":
            ast.parse(choice["text"], mode="eval")
        else:
            assert re.fullmatch(r"[-+*()\d]+", choice["text"])


def test_streamed_several_and_repeated_it_is_the_same(real: httpx.Client) -> None:
    body = {"prompt": [PROMPT, "Once"], "max_tokens": 200, "n": 3, "seed": 5, "response_format": wrapped(PERSON)}
    whole = real.post("/v1/completions", json=body).json()
    assert real.post("/v1/completions", json=body).json()["choices"] == whole["choices"]
    chunks = stream_chunks(real, body)
    assert texts(chunks) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert {i: end["finish_reason"] for i, end in finals(chunks).items()} == dict.fromkeys(range(6), "stop")
    for choice in whole["choices"]:
        jsonschema.validate(json.loads(choice["text"]), PERSON)
    assert len({choice["text"] for choice in whole["choices"]}) > 3


async def test_what_runs_beside_it_changes_nothing(real: httpx.Client) -> None:
    held = {"prompt": PROMPT, "max_tokens": 120, "seed": 5, "response_format": wrapped(PERSON)}
    free = {"prompt": PROMPT, "max_tokens": 120, "seed": 5, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=real.base_url, timeout=60) as client:
        alone = [(await client.post("/v1/completions", json=body)).json()["choices"] for body in (held, free)]
        together = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in [held, free] * 5))
    assert [answer.json()["choices"] for answer in together] == alone * 5


def test_cut_by_max_tokens_it_is_a_beginning(real: httpx.Client) -> None:
    whole = ask(real, response_format=wrapped(PERSON), seed=1)
    cut = ask(real, response_format=wrapped(PERSON), seed=1, max_tokens=10)
    assert cut["finish_reason"] == "length"
    assert whole["text"].startswith(cut["text"])


def test_what_else_is_asked_for_gives_way(real: httpx.Client) -> None:
    body: Json = {
        "structured_outputs": {"choice": ["fox", "foxes"]},
        "min_tokens": 50,
        "ignore_eos": True,
        "logit_bias": {"0": 100, "300": 100},
        "allowed_token_ids": [301, 302],
        "bad_words": ["fox"],
        "repetition_penalty": 1.5,
        "logprobs": 1,
    }
    choice = ask(real, **body)
    assert (choice["text"], choice["finish_reason"]) == ("foxes", "stop")
    assert "".join(choice["logprobs"]["tokens"]) == "foxes"


def test_a_stop_string_still_cuts(real: httpx.Client) -> None:
    choice = ask(real, structured_outputs={"choice": ["one, two"]}, stop=[","])
    assert (choice["text"], choice["stop_reason"]) == ("one", ",")


@pytest.fixture
async def official(real: httpx.Client) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{real.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_with_the_official_client(official: openai.AsyncOpenAI) -> None:
    completion = await official.completions.create(
        model="mosaic", prompt=PROMPT, max_tokens=300, extra_body={"response_format": wrapped(PERSON)}
    )
    jsonschema.validate(json.loads(completion.choices[0].text), PERSON)
    stream = await official.completions.create(
        model="mosaic", prompt=PROMPT, stream=True, extra_body={"structured_outputs": {"choice": ["red", "blue"]}}
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) in ("red", "blue")
    with pytest.raises(openai.BadRequestError) as refused:
        await official.completions.create(model="mosaic", prompt=PROMPT, extra_body={"guided_regex": "("})
    assert (refused.value.param, refused.value.code) == ("guided_regex", "invalid_grammar")


def test_a_grammar_that_turns_out_too_complex_is_the_requests_own_fault(real: httpx.Client) -> None:
    # After a hundred random tokens all is well; what the model is made to write here comes to a limit.
    body = {
        "prompt": PROMPT,
        "max_tokens": 450,
        "ignore_eos": True,
        "temperature": 0,
        "grammar": 'start: ("a"? "b"?)+ | (("a" | "aa" | "ab"){1,40}){1,40}',
        "logit_bias": {"65": 100},
    }
    answer = real.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("grammar_too_complex", "grammar")
    chunks, is_done = read_stream(real, body)
    assert not is_done
    assert chunks[-1]["error"]["code"] == "grammar_too_complex"


def test_without_a_tokenizer_there_is_no_text_to_hold() -> None:
    with GatewayServer(FakeEngine(), served_model()) as server, httpx.Client(base_url=server.url) as client:
        for field in ({"guided_regex": "a"}, {"response_format": {"type": "json_object"}}):
            error = client.post("/v1/completions", json={"prompt": [1], **field}).json()["error"]
            assert error["code"] == "no_tokenizer"
            assert error["param"].startswith(next(iter(field)))


def test_the_engine_is_well_after_all_this(real: httpx.Client) -> None:
    assert real.get("/health").status_code == 200
