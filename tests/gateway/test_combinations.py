"""Fields together over the shipped model: a stream joined is the whole answer, and every count and shape agrees."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from tests.gateway.events import finals, stream_chunks
from tests.gateway.server import MODEL_DIR

Json = dict[str, Any]

TOKENIZER = Tokenizer.load(MODEL_DIR)
assert TOKENIZER is not None
FOXES = TOKENIZER.encode(" 🦊")

# One value or none of each is drawn for each case.
CHOICES: Json = {
    "prompt": ["Once upon a time", ["The 🦊 ran", "Él"], TOKENIZER.encode("One day"), [[5, 6, 0, 7], FOXES[:-1], [9]]],
    "max_tokens": [1, 5, 20, 40],
    "min_tokens": [0, 1],
    "n": [1, 1, 2, 3],
    "temperature": [0, 0.7, 1.3],
    "top_p": [0.8],
    "top_k": [3, 40],
    "typical_p": [0.9],
    "repetition_penalty": [1.2],
    "presence_penalty": [0.5],
    "frequency_penalty": [-0.2],
    # Parts of characters, end tokens and markers in the middle of a text.
    "logit_bias": [{str(i): 12 for i in FOXES}, {"0": 8}],
    "bad_words": [["the", "little girl"]],
    "ignore_eos": [True],
    "stop": ["e", ["little", " and the"], ["\n", "."], ["🦊"], ["�"]],
    "stop_token_ids": [TOKENIZER.encode("."), TOKENIZER.encode(" little")],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False],
    "echo": [True, True],
    "logprobs": [0, 1, 4],
    "logprob_token_ids": [[5, 11, 5]],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "structured_outputs": [
        {"regex": "[a-z ]{5,40}[.!]?"},
        {"choice": ["🦊", "the 🦊", "El", "Él"]},
        {"json": {"type": "array", "items": {"type": "string"}, "maxItems": 3}},
    ],
    "truncate_prompt_tokens": [2],
    "truncation_side": ["right"],
    "seed": [1, 2**60],
    "user": ["me"],
}
ALWAYS = ("prompt", "seed")


def draw(number: int) -> Json:
    """The body of case `number`, the same for ever."""
    rng = random.Random(number)
    body = {name: rng.choice(values) for name, values in CHOICES.items() if name in ALWAYS or rng.random() < 0.4}
    if "logprobs" not in body:
        body.pop("logprob_token_ids", None)
    body["min_tokens"] = min(body.get("min_tokens", 0), body.get("max_tokens", 16))
    if body.get("echo") and rng.random() < 0.25:
        body |= {"max_tokens": 0, "min_tokens": 0}
        body.pop("logprob_token_ids", None)
    return body


def joined(chunks: list[Json], index: int) -> Json:
    """All pieces of a choice put together, in the shape of a whole one."""
    pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    whole = dict(finals(chunks)[index])
    whole["text"] = "".join(piece["text"] for piece in pieces)
    if whole["logprobs"] is not None:
        arrays = whole["logprobs"]
        whole["logprobs"] = {name: [x for piece in pieces for x in piece["logprobs"][name]] for name in arrays}
    if "token_ids" in whole:
        whole["token_ids"] = [x for piece in pieces for x in piece["token_ids"]]
        whole["prompt_token_ids"] = pieces[0]["prompt_token_ids"]
        assert all("prompt_token_ids" not in piece for piece in pieces[1:])
    return whole


def check_choice(choice: Json, body: Json) -> None:
    """What must agree within one choice, whatever was asked for."""
    told, text = choice["logprobs"], choice["text"]
    assert (told is None) == ("logprobs" not in body)
    if told is None:
        return
    lengths = {len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert len(lengths) == 1
    assert all(0 <= a <= b <= len(text) for a, b in zip(told["text_offset"], told["text_offset"][1:], strict=False))
    if "return_token_ids" in body:
        before = choice["prompt_token_ids"] if body.get("echo") else []
        assert len(told["tokens"]) == len(before) + len(choice["token_ids"])
    if "return_tokens_as_token_ids" in body or "stop" in body or "skip_special_tokens" in body:
        return
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        is_text = not token.startswith(("bytes:", "<|"))
        assert not is_text or text[offset : offset + len(token)] == token or choice["finish_reason"] == "stop"


@pytest.mark.parametrize("number", range(60))
def test_a_stream_joined_is_the_whole_answer(real: httpx.Client, number: int) -> None:
    body = draw(number)
    answer = real.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    options = {"include_usage": True, "continuous_usage_stats": number % 2 == 0}
    chunks = stream_chunks(real, {**body, "stream_options": options})
    for index, choice in enumerate(whole["choices"]):
        assert choice["index"] == index
        assert joined(chunks, index) == choice, body
        check_choice(choice, body)
    assert chunks[-1]["choices"] == []
    counted = chunks[-1]["usage"]
    # The second time, more of the prompt is known already; nothing else may differ for that.
    assert 0 <= counted.pop("prompt_tokens_details")["cached_tokens"] <= counted["prompt_tokens"]
    assert counted == {name: n for name, n in whole["usage"].items() if name != "prompt_tokens_details"}
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    if options["continuous_usage_stats"]:
        assert counts == sorted(counts)
        assert counts[-1] == whole["usage"]["completion_tokens"]
    else:
        assert set(counts) == {None}
    if "return_token_ids" in body:
        assert whole["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])


def test_usage_so_far_needs_no_usage_at_the_end(real: httpx.Client) -> None:
    chunks = stream_chunks(real, {"prompt": "a", "max_tokens": 3, "stream_options": {"continuous_usage_stats": True}})
    assert all(chunk["choices"] for chunk in chunks)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks][-1] == 3


def test_ids_out_are_ids_in(real: httpx.Client) -> None:
    body = {"prompt": "Once upon", "max_tokens": 12, "return_token_ids": True, "seed": 5}
    [first] = real.post("/v1/completions", json=body).json()["choices"]
    [again] = real.post("/v1/completions", json={**body, "prompt": first["prompt_token_ids"]}).json()["choices"]
    assert again == first
    ids = [*first["prompt_token_ids"], *first["token_ids"]]
    detokenized = real.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert detokenized == "Once upon" + first["text"]
