"""Every field of a completion request over the shipped model: what a value does, and what is said of a bad one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.gateway.schema import CompletionRequest
from tests.gateway.server import MODEL_DIR

Json = dict[str, Any]

TOKENIZER = Tokenizer.load(MODEL_DIR)
assert TOKENIZER is not None
# Whoever can copy at all continues this with FIRST.
PROMPT = "Once upon a time, there was a little girl. Once upon a time"
PLAIN: Json = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "seed": 7}
WARM: Json = {**PLAIN, "temperature": 1}
FIRST = ", there was a little girl"


def text(answer: Json, choice: int = 0) -> str:
    found: str = answer["choices"][choice]["text"]
    return found


def usage(answer: Json) -> tuple[int, int]:
    return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]


def end(answer: Json) -> tuple[str, object]:
    choice = answer["choices"][0]
    return choice["finish_reason"], choice["stop_reason"]


def ids(what: str) -> list[int]:
    assert TOKENIZER is not None
    return TOKENIZER.encode(what)


def decode(token_ids: list[int]) -> str:
    assert TOKENIZER is not None
    return TOKENIZER.decode(token_ids)


def logprobs(answer: Json) -> Json:
    found: Json = answer["choices"][0]["logprobs"]
    return found


def first_id(table: Json) -> int:
    """The first id of a table of a prompt's log probabilities: the token that is there."""
    return int(next(iter(table)))


def once(what: str) -> int:
    [token_id] = ids(what)
    return token_id


@dataclass(frozen=True)
class Row:
    """`effect(answer, plain)` holds for the answer with `accepted` beside that to the same request without."""

    accepted: object
    effect: Callable[[Json, Json], bool]
    refused: object
    error: str
    base: Json | None = None
    name: str = ""
    """The name in the error, where it is not the field's."""


ROWS: dict[str, Row] = {
    "model": Row(
        "tales", lambda got, plain: (got["model"], plain["model"]) == ("tales", "mosaic"), 5, "must be a string, got 5"
    ),
    "prompt": Row(
        [PROMPT, "The fox"],
        lambda got, plain: (
            text(got) == text(plain) != text(got, 1) and usage(got)[0] == len(ids(PROMPT)) + len(ids("The fox"))
        ),
        "",
        "must not be empty: this model needs at least one token to continue; a space or a newline will do",
    ),
    "max_tokens": Row(
        3, lambda got, plain: usage(got)[1] == 3 and text(plain).startswith(text(got)), -1, "must be at least 0, got -1"
    ),
    "min_tokens": Row(
        10,
        lambda got, plain: usage(plain)[1] < 10 <= usage(got)[1],
        200,
        "must be at most 'max_tokens' (150), got 200",
        {**PLAIN, "max_tokens": 150, "stop_token_ids": [once(" girl")]},
    ),
    "echo": Row(
        True,
        lambda got, plain: text(got) == PROMPT + text(plain) and usage(got) == usage(plain),
        1,
        "must be true or false, got 1",
    ),
    "logprobs": Row(
        2,
        lambda got, plain: (
            len(logprobs(got)["tokens"]) == 24 and {len(t) for t in logprobs(got)["top_logprobs"]} == {2}
        ),
        21,
        "must be at most 20, got 21",
    ),
    "logprob_token_ids": Row(
        [once(" girl"), 5],
        lambda got, plain: {" girl", "%"} <= logprobs(got)["top_logprobs"][0].keys(),
        [4096],
        "must be at least 0 and at most 4095, got 4096",
        {**PLAIN, "logprobs": 0},
        "logprob_token_ids[0]",
    ),
    "prompt_logprobs": Row(
        1,
        lambda got, plain: (
            [p and first_id(p) for p in got["choices"][0]["prompt_logprobs"]] == [None, *ids(PROMPT)[1:]]
        ),
        -1,
        "must be at least 0, got -1",
    ),
    "include_stop_str_in_output": Row(
        True,
        lambda got, plain: text(got) == text(plain) + "little",
        1,
        "must be true or false, got 1",
        {**PLAIN, "stop": "little"},
    ),
    "skip_special_tokens": Row(
        False,
        lambda got, plain: (text(plain), text(got)) == ("", "<|endoftext|>" * 24),
        0,
        "must be true or false, got 0",
        {**PLAIN, "logit_bias": {"0": 100}, "ignore_eos": True},
    ),
    "return_token_ids": Row(
        True,
        lambda got, plain: (
            got["choices"][0]["prompt_token_ids"] == ids(PROMPT)
            and decode(got["choices"][0]["token_ids"]) == text(plain)
        ),
        1,
        "must be true or false, got 1",
    ),
    "return_tokens_as_token_ids": Row(
        True,
        lambda got, plain: logprobs(got)["tokens"] == [f"token_id:{once(t)}" for t in logprobs(plain)["tokens"]],
        1,
        "must be true or false, got 1",
        {**PLAIN, "logprobs": 0, "max_tokens": 10},
    ),
    "temperature": Row(1.5, lambda got, plain: text(got) != text(plain), -1, "must be at least 0, got -1"),
    "top_p": Row(1e-9, lambda got, plain: text(got).startswith(FIRST), 0, "must be greater than 0, got 0", WARM),
    "top_k": Row(1, lambda got, plain: text(got).startswith(FIRST), -2, "must be at least -1, got -2", WARM),
    "min_p": Row(1, lambda got, plain: text(got).startswith(FIRST), 2, "must be at most 1, got 2", WARM),
    "typical_p": Row(0.01, lambda got, plain: text(got) != text(plain), 0, "must be greater than 0, got 0", WARM),
    "repetition_penalty": Row(
        1.9, lambda got, plain: " a " in text(plain) and " a " not in text(got), 0, "must be at least 0.01, got 0"
    ),
    "presence_penalty": Row(2, lambda got, plain: text(got) != text(plain), 2.5, "must be at most 2, got 2.5", WARM),
    "frequency_penalty": Row(
        -2,
        lambda got, plain: len(set(text(got).split())) < len(set(text(plain).split())),
        -3,
        "must be at least -2, got -3",
    ),
    "logit_bias": Row(
        {str(once(" forest")): 100},
        lambda got, plain: text(got) == " forest" * 24,
        {"4096": 1},
        "must have token ids, 0 to 4095, as its keys; '4096' is none",
    ),
    "allowed_token_ids": Row(
        ids(" forest ran"),
        lambda got, plain: set(text(got).split()) <= {"forest", "ran"},
        [4096],
        "must be at least 0 and at most 4095, got 4096",
        name="allowed_token_ids[0]",
    ),
    "bad_words": Row(
        ["little", "girl"],
        lambda got, plain: FIRST in text(plain) and not {"little", "girl"} & set(text(got).split()),
        [""],
        "must not be empty",
        name="bad_words[0]",
    ),
    "seed": Row(
        8, lambda got, plain: text(got) != text(plain) and got["seed"] == 8, 2.5, "must be an integer, got 2.5", WARM
    ),
    "n": Row(
        3,
        lambda got, plain: len({text(got, i) for i in range(3)}) == 3 and text(got) == text(plain),
        0,
        "must be at least 1, got 0",
        WARM,
    ),
    "stop": Row(
        "little",
        lambda got, plain: (text(got), end(got)) == (", there was a ", ("stop", "little")),
        5,
        "must be an array, got 5",
    ),
    "stop_token_ids": Row(
        [once(" girl")],
        lambda got, plain: (text(got), end(got)) == (", there was a little", ("stop", once(" girl"))),
        [-1],
        "must be at least 0 and at most 4095, got -1",
        name="stop_token_ids[0]",
    ),
    "ignore_eos": Row(
        True,
        lambda got, plain: (usage(plain)[1], usage(got)[1]) == (1, 24),
        1,
        "must be true or false, got 1",
        {**PLAIN, "logit_bias": {"0": 100}},
    ),
    "truncate_prompt_tokens": Row(
        2,
        lambda got, plain: usage(got)[0] == 2 and text(got) != text(plain),
        0,
        "must be -1 or at least 1, got 0",
    ),
    "truncation_side": Row(
        "right",
        lambda got, plain: usage(got)[0] == usage(plain)[0] == 2 and text(got) != text(plain),
        "middle",
        "must be 'left' or 'right'",
        {**PLAIN, "truncate_prompt_tokens": 2},
    ),
    "add_special_tokens": Row(False, lambda got, plain: text(got) == text(plain), "no", "must be true or false"),
    "stream": Row(False, lambda got, plain: text(got) == text(plain), 1, "must be true or false, got 1"),
    "stream_options": Row(None, lambda got, plain: text(got) == text(plain), {}, "needs 'stream' to be true"),
    "response_format": Row(
        {"type": "json_schema", "json_schema": {"name": "b", "schema": {"type": "boolean"}}},
        lambda got, plain: text(got) in ("true", "false") and end(got) == ("stop", None),
        {"type": "json"},
        "must be 'text', 'json_object' or 'json_schema'",
        name="response_format.type",
    ),
    "structured_outputs": Row(
        {"regex": "[0-9]{3}"},
        lambda got, plain: re.fullmatch("[0-9]{3}", text(got)) is not None,
        {},
        "must have one of 'json', 'regex', 'choice', 'grammar' and 'json_object'",
    ),
    "guided_json": Row(
        {"enum": [1, None]}, lambda got, plain: text(got) in ("1", "null"), 5, "must be a JSON schema, an object"
    ),
    "guided_regex": Row("a+b", lambda got, plain: set(text(got)) <= {"a", "b"}, 5, "must be a string, got 5"),
    "guided_choice": Row(
        ["yes", "no"], lambda got, plain: text(got) in ("yes", "no"), [], "must not be empty, nor may any of its texts"
    ),
    "guided_grammar": Row(
        'start: "a" | "(" start ")"', lambda got, plain: set(text(got)) <= {"a", "(", ")"}, 5, "must be a string, got 5"
    ),
    "grammar": Row(
        'root ::= "x" | "y" root', lambda got, plain: set(text(got)) <= {"x", "y"}, 5, "must be a string, got 5"
    ),
    "json_schema": Row({"const": 7}, lambda got, plain: text(got) == "7", "{}", "must be an object"),
    "user": Row("me", lambda got, plain: text(got) == text(plain), 5, "must be a string, got 5"),
    "request_id": Row(
        "my-own-1",
        lambda got, plain: got["id"] == "my-own-1" != plain["id"],
        "a b",
        "must be 1 to 128 letters, digits, '.', '_' or '-'",
    ),
    "priority": Row(
        -5, lambda got, plain: text(got) == text(plain), 2**31, "must be at most 2147483647, got 2147483648"
    ),
    "cache_salt": Row("pepper", lambda got, plain: text(got) == text(plain), "", "must not be empty"),
    "timeout": Row(
        0.02,
        lambda got, plain: (
            end(got)[0] == "deadline" and text(plain).startswith(text(got)) and usage(got) < usage(plain)
        ),
        0,
        "must be greater than 0, got 0",
        {**PLAIN, "max_tokens": 490, "ignore_eos": True},
    ),
}


def ask(client: httpx.Client, body: Json) -> Json:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def test_every_field_has_its_row() -> None:
    assert ROWS.keys() == CompletionRequest.model_fields.keys()


@pytest.mark.parametrize("field", ROWS)
def test_a_field_has_its_effect(real: httpx.Client, field: str) -> None:
    row = ROWS[field]
    plain = row.base or PLAIN
    got = ask(real, {**plain, field: row.accepted})
    assert row.effect(got, ask(real, plain)), got
    assert text(ask(real, {**plain, field: row.accepted})) == text(got) or field == "timeout", "not reproducible"


@pytest.mark.parametrize("field", ROWS)
def test_a_bad_value_is_refused(real: httpx.Client, field: str) -> None:
    row = ROWS[field]
    answer = real.post("/v1/completions", json={**(row.base or PLAIN), field: row.refused})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    name = row.name or (field if field != "stop_token_ids" else "stop_token_ids[0]")
    assert error["message"].removeprefix(f"'{name}' ") == row.error
    assert error["param"].startswith(field)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")


@pytest.mark.parametrize("field", [field for field in ROWS if field != "prompt"])
def test_null_is_the_default(real: httpx.Client, field: str) -> None:
    plain = {**PLAIN, "max_tokens": 2}
    assert text(ask(real, {**plain, field: None})) == text(ask(real, {k: v for k, v in plain.items() if k != field}))


@pytest.mark.parametrize("words", [["little girl"], [" little"], ["named B", "girl"], ["a"], ["ther"], ["é", "🦊"]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_bad_words_are_not_spelled_by_any_tokens(real: httpx.Client, words: list[str], temperature: float) -> None:
    for seed in range(4):
        said = text(
            ask(real, {**PLAIN, "bad_words": words, "seed": seed, "temperature": temperature, "max_tokens": 60})
        )
        assert not {word.strip() for word in words} & set(said.replace(",", " ").replace(".", " ").split())
        assert not any(f" {word.strip()} " in said for word in words)


def test_the_id_is_the_same_in_body_header_and_error(real: httpx.Client) -> None:
    headers = {"x-request-id": "of-the-header"}
    answer = real.post("/v1/completions", json=PLAIN, headers=headers)
    assert answer.json()["id"] == answer.headers["x-request-id"] == "of-the-header"
    answer = real.post("/v1/completions", json={**PLAIN, "request_id": "of-the-body"}, headers=headers)
    assert answer.json()["id"] == answer.headers["x-request-id"] == "of-the-body"
    answer = real.post("/v1/completions", json={**PLAIN, "request_id": "of-the-body", "n": 0})
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, "of-the-body")


def test_the_deadline_counts_from_the_arrival_and_ends_every_choice(real: httpx.Client) -> None:
    got = ask(real, {**WARM, "timeout": 1e-6, "n": 3})
    assert [(c["finish_reason"], c["text"]) for c in got["choices"]] == [("deadline", "")] * 3
    assert usage(got) == (len(ids(PROMPT)), 0)


def test_a_long_prompt_is_cut_to_what_fits(real: httpx.Client) -> None:
    long = "word " * 2000
    got = ask(real, {**PLAIN, "prompt": long, "truncate_prompt_tokens": -1})
    assert usage(got) == (512 - 24, 24)
    many = ids(long)
    whole = ask(real, {**PLAIN, "prompt": [many, many[:9]], "truncate_prompt_tokens": -1})
    assert text(whole) == text(got)
    assert usage(whole)[0] == 512 - 24 + 9


def test_many_filters_together_stay_reproducible_and_choices_distinct(real: httpx.Client) -> None:
    body = {
        **WARM, "n": 4, "prompt": [PROMPT, "The fox"], "top_p": 0.9, "top_k": 50, "min_p": 0.01, "typical_p": 0.9,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1, "logit_bias": {"5": -5},
        "bad_words": ["girl"],
    }  # fmt: skip
    first, again = ask(real, body), ask(real, body)
    assert [c["text"] for c in first["choices"]] == [c["text"] for c in again["choices"]]
    assert len({c["text"] for c in first["choices"]}) == 8
    alone = ask(real, {**body, "prompt": "The fox"})
    assert [text(alone, i) for i in range(4)] == [text(first, 4 + i) for i in range(4)]


@pytest.mark.parametrize(("is_included", "text_of_end"), [(False, ""), (True, "<|endoftext|>")])
def test_the_end_token_is_text_only_where_it_was_asked_for(
    real: httpx.Client, is_included: bool, text_of_end: str
) -> None:
    body = {**PLAIN, "logit_bias": {"0": 100}, "skip_special_tokens": False, "include_stop_str_in_output": is_included}
    answer = real.post("/v1/completions", json=body).json()
    assert (text(answer), *end(answer), usage(answer)[1]) == (text_of_end, "stop", None, 1)
