"""The official client, unchanged, synchronous and asynchronous."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from model.tokenizer import Tokenizer
from service.engine.errors import EngineOverloadedError
from service.engine.request import FinishReason
from tests.gateway.fake_engine import FakeEngine, hang, say, steps
from tests.gateway.server import GatewayServer, wait_until

STORY = "The fox ran home."


@pytest.fixture
def sync_client(server: GatewayServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(server: GatewayServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models(sync_client: openai.OpenAI) -> None:
    assert [model.id for model in sync_client.models.list()] == ["mosaic", "tales"]
    assert sync_client.models.retrieve("tales").id == "tales"
    with pytest.raises(openai.NotFoundError):
        sync_client.models.retrieve("nope")


def test_a_completion(sync_client: openai.OpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = say(tokenizer.encode(STORY))
    completion = sync_client.completions.create(
        model="mosaic",
        prompt="Once",
        max_tokens=50,
        temperature=0.7,
        top_p=0.9,
        seed=3,
        stop=["zzz"],
        n=1,
        user="me",
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    assert completion.choices[0].text == STORY
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(tokenizer.encode(STORY))
    assert completion.system_fingerprint
    assert engine.requests[0].sampling.top_k == 5


def test_a_stream(sync_client: openai.OpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = say(tokenizer.encode(STORY), delay_s=0.001)
    chunks = list(
        sync_client.completions.create(
            model="mosaic", prompt="Once", max_tokens=50, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == STORY
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(STORY))


def test_errors_are_the_clients_own(sync_client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sync_client.completions.create(model="mosaic", prompt="x", suffix="y")
    assert (refused.value.param, refused.value.code) == ("suffix", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        sync_client.completions.create(model="nope", prompt="x")
    engine.script = steps(EngineOverloadedError("the queue is full", 3))
    with pytest.raises(openai.InternalServerError) as full:
        sync_client.completions.create(model="mosaic", prompt="x", stream=True)
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "3"


def test_a_failure_in_a_stream_is_raised_by_the_client(sync_client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = steps([5], FinishReason.ERROR)
    with pytest.raises(openai.APIError, match="generation failed"):
        list(sync_client.completions.create(model="mosaic", prompt="x", stream=True))


def test_leaving_a_stream_early_frees_the_engine(sync_client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = hang([5])
    stream = sync_client.completions.create(model="mosaic", prompt="x", stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: engine.aborted, "the abort")


async def test_the_asynchronous_client(
    async_client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = say(tokenizer.encode(STORY))
    completion = await async_client.completions.create(model="tales", prompt=["a", "b"], max_tokens=50)
    assert [choice.text for choice in completion.choices] == [STORY, STORY]
    stream = await async_client.completions.create(model="tales", prompt=[1, 2], max_tokens=50, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == STORY
