"""What is refused, and whether the answer says why: one row for each way to be wrong."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from service.gateway.unsupported import NEUTRAL_COMPLETION_VALUES
from tests.gateway.fake_engine import FakeEngine

LONG_TEXT = "word " * 2000

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # What is sent, the parameter the error names, words its message has.
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": []}, "prompt", "must not be empty"),
    ({"prompt": [[]]}, "prompt[0]", "'prompt[0]' must not be empty"),
    ({"prompt": ["a", ""]}, "prompt[1]", "'prompt[1]' must not be empty"),
    ({"prompt": 5}, "prompt", "must be a string, an array"),
    ({"prompt": {}}, "prompt", "must be a string, an array"),
    ({"prompt": [None]}, "prompt", "must be a string, an array"),
    ({"prompt": [True]}, "prompt", "must be a string, an array"),
    ({"prompt": [1.5]}, "prompt", "must be a string, an array"),
    ({"prompt": ["a", 1]}, "prompt", "'prompt[1]'"),
    ({"prompt": [1, True]}, "prompt", "'prompt[1]'"),
    ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "'prompt[1][0]' must be a token id"),
    ({"prompt": [[1, 2.0]]}, "prompt[0][1]", "'prompt[0][1]' must be a token id"),
    ({"prompt": [1, 4096]}, "prompt[1]", "'prompt[1]' must be at least 0 and at most 4095, got 4096"),
    ({"prompt": [[1], [-1]]}, "prompt[1][0]", "'prompt[1][0]' must be at least 0"),
    ({"prompt": [1] * 512}, "prompt", "512 tokens"),
    ({"prompt": ["a", LONG_TEXT]}, "prompt[1]", "'prompt[1]' has at least"),
    ({"prompt": ["a"] * 129}, "prompt", "129 prompts; the limit is 128"),
    ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"max_tokens": 2.0}, "max_tokens", "must be an integer, got 2.0"),
    ({"max_tokens": "5"}, "max_tokens", "must be an integer"),
    ({"max_tokens": True}, "max_tokens", "must be an integer"),
    ({"max_tokens": 2**40}, "max_tokens", "at most"),
    ({"max_tokens": 10**30}, "max_tokens", "out of range"),
    ({"max_tokens": 512}, "max_tokens", "'max_tokens' (512) and a prompt of 1 tokens make 513"),
    ({"min_tokens": 17}, "min_tokens", "at most 'max_tokens' (16), got 17"),
    ({"min_tokens": -1}, "min_tokens", "at least 0"),
    ({"temperature": -0.1}, "temperature", "at least 0"),
    ({"temperature": 101}, "temperature", "at most 100"),
    ({"temperature": "hot"}, "temperature", "must be a number"),
    ({"temperature": False}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.01}, "top_p", "at most 1"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"top_k": 1.5}, "top_k", "must be an integer"),
    ({"min_p": -0.1}, "min_p", "at least 0"),
    ({"min_p": 2}, "min_p", "at most 1"),
    ({"seed": 2**63}, "seed", "at most 9223372036854775807"),
    ({"seed": 2**64}, "seed", "out of range"),
    ({"seed": 1.0}, "seed", "must be an integer"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 65}, "n", "at most 64, got 65"),
    ({"n": 64, "prompt": [[1]] * 5}, "n", "at most 256"),
    ({"stop": ""}, "stop[0]", "must not be empty"),
    ({"stop": ["a", ""]}, "stop[1]", "must not be empty"),
    ({"stop": ["a", 1]}, "stop[1]", "must be a string"),
    ({"stop": 5}, "stop", "must be an array"),
    ({"stop": ["x"] * 17}, "stop", "at most 16 strings, got 17"),
    ({"stop": "x" * 257}, "stop[0]", "at most 256 characters"),
    ({"stop_token_ids": 5}, "stop_token_ids", "must be an array"),
    ({"stop_token_ids": [1, "2"]}, "stop_token_ids[1]", "must be an integer"),
    ({"stop_token_ids": [4096]}, "stop_token_ids[0]", "'stop_token_ids[0]' must be at least 0 and at most 4095"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64"),
    ({"ignore_eos": 1}, "ignore_eos", "must be true or false"),
    ({"stream": "true"}, "stream", "must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs 'stream'"),
    ({"stream": True, "stream_options": 5}, "stream_options", "must be an object"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": 1}},
        "stream_options.continuous_usage_stats",
        "true or",
    ),
    ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "is not a parameter"),
    ({"logprobs": -1}, "logprobs", "at least 0, got -1"),
    ({"logprobs": 21}, "logprobs", "at most 20, got 21"),
    ({"logprobs": True}, "logprobs", "must be an integer"),
    ({"logprobs": 10**30}, "logprobs", "out of range"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "at least 0, got -1"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20, got 21"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "cannot be streamed"),
    ({"logprobs": 20, "max_tokens": 500, "n": 64, "prompt": [[1]] * 2}, "logprobs", "would have 1344000 log prob"),
    ({"prompt_logprobs": 20, "n": 64, "prompt": [[1] * 400] * 2, "max_tokens": 1}, "prompt_logprobs", "1075200"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs 'logprobs'"),
    ({"logprob_token_ids": [4096], "logprobs": 0}, "logprob_token_ids[0]", "at most 4095, got 4096"),
    ({"logprob_token_ids": [1] * 129, "logprobs": 0}, "logprob_token_ids", "at most 128 token ids"),
    (
        {"logprob_token_ids": [1], "logprobs": 0, "echo": True, "max_tokens": 0},
        "logprob_token_ids",
        "'max_tokens' of at least 1",
    ),
    ({"echo": 1}, "echo", "must be true or false"),
    ({"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens", "at most 'max_tokens' (0), got 1"),
    ({"echo": True, "max_tokens": 0, "prompt": [1] * 513}, "prompt", "513 tokens"),
    ({"return_token_ids": "yes"}, "return_token_ids", "must be true or false"),
    ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids", "must be true or false"),
    ({"skip_special_tokens": 0}, "skip_special_tokens", "must be true or false"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "must be true or false"),
    ({"typical_p": 0}, "typical_p", "greater than 0"),
    ({"typical_p": 1.5}, "typical_p", "at most 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.01, got 0"),
    ({"repetition_penalty": 1e300}, "repetition_penalty", "at most 100"),
    ({"repetition_penalty": "1"}, "repetition_penalty", "must be a number"),
    ({"presence_penalty": 2.1}, "presence_penalty", "at most 2"),
    ({"presence_penalty": True}, "presence_penalty", "must be a number"),
    ({"frequency_penalty": -3}, "frequency_penalty", "at least -2"),
    ({"frequency_penalty": False}, "frequency_penalty", "must be a number"),
    ({"logit_bias": [5]}, "logit_bias", "must be an object"),
    ({"logit_bias": {"5": 100.5}}, "logit_bias.5", "at most 100, got 100.5"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5", "must be a number"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "token ids, 0 to 4095, as its keys; '4096' is none"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' is none"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "'05' is none"),
    ({"logit_bias": {"٥": 1}}, "logit_bias", "is none"),
    ({"logit_bias": {"9" * 9999: 1}}, "logit_bias", "is none"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is none"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024 token ids, got 1025"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "must not be empty"),
    ({"allowed_token_ids": 5}, "allowed_token_ids", "must be an array"),
    ({"allowed_token_ids": [4096]}, "allowed_token_ids[0]", "at most 4095, got 4096"),
    ({"allowed_token_ids": [1.0]}, "allowed_token_ids[0]", "must be an integer"),
    ({"allowed_token_ids": [1] * 1025}, "allowed_token_ids", "at most 1024 token ids"),
    ({"bad_words": "fox"}, "bad_words", "must be an array"),
    ({"bad_words": [""]}, "bad_words[0]", "must not be empty"),
    ({"bad_words": ["x"] * 65}, "bad_words", "at most 64 words"),
    ({"bad_words": ["a", "é" * 33]}, "bad_words[1]", "at most 64 bytes, got 66"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1, got 0"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "at least -1"),
    ({"truncate_prompt_tokens": 1.5}, "truncate_prompt_tokens", "must be an integer"),
    ({"truncation_side": "middle"}, "truncation_side", "must be 'left' or 'right'"),
    ({"truncation_side": 5}, "truncation_side", "must be 'left' or 'right'"),
    ({"prompt": [4096, 1, 1], "truncate_prompt_tokens": 3}, "prompt[0]", "'prompt[0]' must be at least 0"),
    ({"prompt": [1, 1, 4096], "truncate_prompt_tokens": 1}, "prompt[2]", "'prompt[2]' must be at least 0"),
    ({"prompt": [1] * 600, "truncate_prompt_tokens": 600}, "prompt", "600 tokens"),
    ({"prompt": LONG_TEXT, "truncate_prompt_tokens": 510, "max_tokens": 16}, "max_tokens", "make 526"),
    ({"add_special_tokens": "no"}, "add_special_tokens", "must be true or false"),
    ({"request_id": "a b"}, "request_id", "letters, digits"),
    ({"request_id": ""}, "request_id", "letters, digits"),
    ({"request_id": "a\n"}, "request_id", "letters, digits"),
    ({"request_id": "x" * 129}, "request_id", "letters, digits"),
    ({"request_id": 5}, "request_id", "must be a string"),
    ({"priority": 1.0}, "priority", "must be an integer"),
    ({"priority": 2**31}, "priority", "at most 2147483647"),
    ({"cache_salt": ""}, "cache_salt", "must not be empty"),
    ({"cache_salt": "s" * 257}, "cache_salt", "at most 256 characters"),
    ({"timeout": 0}, "timeout", "greater than 0"),
    ({"timeout": "5"}, "timeout", "must be a number"),
    ({"timeout": 3601}, "timeout", "at most 3600, got 3601"),
    ({"timeout": 1e300}, "timeout", "at most 3600"),
    ({"response_format": {}}, "response_format.type", "is required"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "must be 'text', 'json_object' or 'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
    ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema", "needs"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "is required",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
        "response_format.json_schema.schema",
        "cannot be followed: Invalid type: foo",
    ),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "must have one of"),
    ({"structured_outputs": {"xml": "x"}}, "structured_outputs.xml", "is not a parameter"),
    (
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
        "supp",
    ),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported by"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "must be 'text', 'json_object' or"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "cannot be used together"),
    ({"structured_outputs": {"json": [1]}}, "structured_outputs.json", "must be a JSON schema, an object"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not valid JSON"),
    (
        {"structured_outputs": {"json": '{"type": "object", "anyOf": [{"minLength": 1, "minLength": 2}]}'}},
        "structured_outputs.json",
        "has 'anyOf[0].minLength' more than once",
    ),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", 'not supported: ["not"]'),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "allows no text"),
    ({"structured_outputs": {"regex": "a" * 4097}}, "structured_outputs.regex", "at most 4096 characters, got 4097"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", 'unknown name: "x"'),
    ({"guided_json": {"const": "x" * 65536}}, "guided_json", "at most 65536 bytes"),
    ({"guided_json": "[" * 70000}, "guided_json", "at most 65536 bytes"),
    ({"json_schema": json.loads('{"a":' * 70 + "{}" + "}" * 70)}, "json_schema", "nested more than 64 deep"),
    ({"json_schema": {"x-guidance": {"lenient": True}}}, "json_schema", "'x-guidance' is not supported"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "nor may any of its texts"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice", "at most 1024 texts, got 1025"),
    ({"guided_choice": ["a" * 65536]}, "guided_choice", "at most 65536 bytes"),
    ({"guided_grammar": "#" * 65537}, "guided_grammar", "at most 65536 bytes"),
    (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "guided_regex",
        "'response_format.json_object'",
    ),
    ({"grammar": 'start: "a" <|endoftext|>'}, "grammar", "names a token"),
    ({"user": 5}, "user", "must be a string"),
    ({"user": "u" * 257}, "user", "at most 256 characters"),
    ({"model": 5}, "model", "must be a string"),
    ({"max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
    ({"n_predict": 5}, "n_predict", "did you mean 'max_tokens'?"),
    ({"repeat_penalty": 1.1}, "repeat_penalty", "did you mean 'repetition_penalty'?"),
    ({"n_probs": 3}, "n_probs", "did you mean 'logprobs'?"),
    ({"frobnicate": None}, "frobnicate", "is not a parameter of this endpoint"),
    ({"x" * 5000: 1}, "x" * 63 + "…", "is not a parameter"),
]
# For each field that is known but not supported: a value that asks for something.
UNSUPPORTED: dict[str, Any] = {
    "beam_width": 2,
    "best_of": 2,
    "early_stopping": True,
    "ec_transfer_params": {},
    "guided_decoding_backend": "xgrammar",
    "guided_whitespace_pattern": " *",
    "kv_transfer_params": {},
    "length_penalty": 2,
    "logits_processors": [],
    "prompt_embeds": "x",
    "repetition_detection": {},
    "return_token_offsets": True,
    "spaces_between_special_tokens": 1,
    "structural_tag": {},
    "suffix": "x",
    "thinking_token_budget": 5,
    "use_beam_search": True,
    "vllm_xargs": {},
    "whitespace_pattern": " *",
}


def post(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": [1], **body})


def assert_refused(answer: httpx.Response, param: str) -> str:
    """The message of a well-shaped 400 that names `param`."""
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert f"'{param.split('[')[0].removesuffix('…')}" in error["message"]
    assert len(error["message"]) <= 500
    return str(error["message"])


@pytest.mark.parametrize(("body", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(
    client: httpx.Client, engine: FakeEngine, body: dict[str, Any], param: str, words: str
) -> None:
    assert words in assert_refused(post(client, body), param)
    assert engine.requests == []


def test_a_prompt_is_required(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"max_tokens": 5})
    assert assert_refused(answer, "prompt") == "'prompt' is required"
    assert answer.json()["error"]["code"] == "missing_parameter"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": [1] * 512}, "context_length_exceeded"),
        ({"prompt": LONG_TEXT}, "context_length_exceeded"),
        ({"prompt": "word " * 510}, "context_length_exceeded"),
        ({"prompt": "word " * 600}, "context_length_exceeded"),
        ({"max_tokens": 512}, "context_length_exceeded"),
        ({"suffix": "x"}, "unsupported_parameter"),
        ({"foo": 1}, "unknown_parameter"),
        ({"n": 0}, "invalid_value"),
    ],
)
def test_codes_tell_kinds_of_errors_apart(client: httpx.Client, body: dict[str, Any], code: str) -> None:
    assert post(client, body).json()["error"]["code"] == code


def test_a_prompt_that_is_too_long_is_told_both_numbers(client: httpx.Client) -> None:
    message = post(client, {"prompt": [1] * 400, "max_tokens": 200}).json()["error"]["message"]
    assert "200" in message
    assert "400" in message
    assert "600" in message
    assert "512" in message


def test_a_text_is_measured_as_its_ids_are(client: httpx.Client, engine: FakeEngine) -> None:
    for extra in ({}, {"min_tokens": 3}, {"max_tokens": 8}, {"truncate_prompt_tokens": 600}):
        message = assert_refused(post(client, {"prompt": "word " * 600, **extra}), "prompt")
        again = post(client, {"prompt": "word " * 600, **extra, "max_tokens": 1}).json()["error"]["message"]
        assert message == again
        assert "no room to generate" in message
    scored = {"echo": True, "max_tokens": 0, "logprobs": 0}
    for prompt in ("word " * 600, [1] * 513):
        assert "it may have 512" in assert_refused(post(client, {"prompt": prompt, **scored}), "prompt")
    assert engine.requests == []


def test_every_known_unsupported_field_has_its_row() -> None:
    assert UNSUPPORTED.keys() == NEUTRAL_COMPLETION_VALUES.keys()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields_are_refused_unless_they_ask_for_nothing(
    client: httpx.Client, engine: FakeEngine, name: str
) -> None:
    message = assert_refused(post(client, {name: UNSUPPORTED[name]}), name)
    assert "not supported" in message
    for neutral in (None, *NEUTRAL_COMPLETION_VALUES[name]):
        assert post(client, {name: neutral}).status_code == 200, neutral


@pytest.mark.parametrize(("name", "value"), [("length_penalty", True), ("use_beam_search", 0), ("best_of", True)])
def test_neutral_numbers_and_switches_are_not_confused(client: httpx.Client, name: str, value: object) -> None:
    assert_refused(post(client, {name: value}), name)


def test_a_model_that_is_not_served_is_not_found(client: httpx.Client) -> None:
    answer = post(client, {"model": "gpt-9"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_other_endpoints_refuse_in_the_same_way(client: httpx.Client, path: str) -> None:
    field = "prompt" if path == "/tokenize" else "tokens"
    assert assert_refused(client.post(path, json={}), field) == f"'{field}' is required"
    assert_refused(client.post(path, json={field: 5}), field)
    good: object = "x" if path == "/tokenize" else [1]
    assert_refused(client.post(path, json={field: good, "foo": 1}), "foo")
    assert client.post(path, json={field: good, "model": "nope"}).status_code == 404
