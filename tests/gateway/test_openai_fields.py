"""The official client, unchanged, with the fields it knows and, in `extra_body`, those it does not."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

KNOWN: dict[str, Any] = {
    "prompt": ["Once upon a time", "The fox"],
    "max_tokens": 12,
    "n": 2,
    "logprobs": 2,
    "echo": True,
    "temperature": 0.8,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {"11": -3},
    "stop": [" and"],
    "seed": 11,
    "user": "me",
}
EXTRA: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "top_k": 30,
    "min_p": 0.01,
    "typical_p": 0.95,
    "bad_words": ["girl"],
    "min_tokens": 2,
    "include_stop_str_in_output": True,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "priority": 1,
    "cache_salt": "pepper",
    "timeout": 60,
}


def base_url(real: httpx.Client) -> str:
    return f"{str(real.base_url).rstrip('/')}/v1"


def test_the_synchronous_client(real: httpx.Client) -> None:
    with openai.OpenAI(base_url=base_url(real), api_key="none", max_retries=0, timeout=30) as client:
        whole = client.completions.create(model="mosaic", extra_body=EXTRA, **KNOWN)
        chunks = list(client.completions.create(model="mosaic", extra_body=EXTRA, stream=True, **KNOWN))
    check(whole, chunks)


async def test_the_asynchronous_client(real: httpx.Client) -> None:
    async with openai.AsyncOpenAI(base_url=base_url(real), api_key="none", max_retries=0, timeout=30) as client:
        whole = await client.completions.create(model="mosaic", extra_body=EXTRA, **KNOWN)
        stream = await client.completions.create(model="mosaic", extra_body=EXTRA, stream=True, **KNOWN)
        chunks = [chunk async for chunk in stream]
    check(whole, chunks)


def check(whole: Any, chunks: list[Any]) -> None:
    """Text, log probabilities and ids of four choices, streamed and not."""
    assert len(whole.choices) == 4
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert choice.text.startswith(KNOWN["prompt"][choice.index // 2])
        assert choice.logprobs.tokens == [t for piece in pieces for t in piece.logprobs.tokens]
        assert choice.logprobs.text_offset == [o for piece in pieces for o in piece.logprobs.text_offset]
        assert choice.logprobs.token_logprobs[0] is None
        ids = [*choice.prompt_token_ids, *choice.token_ids]
        assert choice.logprobs.tokens == [f"token_id:{i}" for i in ids]
        assert choice.token_ids == [i for piece in pieces for i in piece.token_ids]
    assert whole.usage.completion_tokens == sum(len(choice.token_ids) for choice in whole.choices)
    assert 0 <= whole.usage.prompt_tokens_details.cached_tokens <= whole.usage.prompt_tokens


def test_a_refusal_is_the_clients_own(real: httpx.Client) -> None:
    with openai.OpenAI(base_url=base_url(real), api_key="none", max_retries=0, timeout=30) as client:
        for body, param in (
            ({"logprobs": 21}, "logprobs"),
            ({"best_of": 3}, "best_of"),
            ({"n": 2, "best_of": 1}, "best_of"),
            ({"suffix": "x"}, "suffix"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(model="mosaic", prompt="x", **body)  # type: ignore[call-overload]
            assert refused.value.param == param
        assert client.completions.create(model="mosaic", prompt="x", n=2, best_of=2).choices[1].index == 1
