"""Nonsense in any field, alone and together: an answer or a refusal that names a field, never a failure."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest

from service.gateway.schema import CompletionRequest
from service.gateway.unsupported import NEUTRAL_COMPLETION_VALUES
from tests.gateway.events import parse_events

NONSENSE: list[Any] = [
    None, True, False, 0, -0.0, 1, -1, 2, 0.5, 20, 21, 2**31, -(2**63), 2**63, 10**40, 1e308, 5e-324, "", "a", "5", " ",
    "\x00", "é" * 300, "<|endoftext|>", [], {}, [[]], [None], [0], [-1], [4095], [4096], [1.5], [True], ["", ""], ["a"],
    [[1, 2]], [["a"]], [0] * 3000, ["x"] * 300, {"5": 1}, {"5": None}, {"a": 1}, {"-1": 1}, {"5": 1e308},
    {"include_usage": 1}, {"include_usage": True}, {"continuous_usage_stats": True}, "left", "right", {"type": "text"},
]  # fmt: skip
FIELDS = sorted({*CompletionRequest.model_fields, *NEUTRAL_COMPLETION_VALUES} - {"model"})


def body_of(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    body: dict[str, Any] = {"prompt": rng.choice(["a", [5, 6], ["a", "b"]]), "max_tokens": rng.choice([1, 3])}
    if rng.random() < 0.3:
        body |= {"stream": True}
    for name in rng.sample(FIELDS, rng.choice([1, 1, 2, 4])):
        body[name] = rng.choice(NONSENSE)
    return body


@pytest.mark.parametrize("start", range(0, 300, 100))
def test_nonsense_is_answered_or_refused_by_name(real: httpx.Client, start: int) -> None:
    for number in range(start, start + 100):
        body = body_of(number)
        answer = real.post("/v1/completions", json=body)
        assert answer.status_code in (200, 400), (body, answer.text)
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["param"] is not None, (body, error)
            assert error["param"].split(".")[0].split("[")[0] in body, (body, error)
            assert len(error["message"]) <= 500
        elif body.get("stream"):
            chunks, is_done = parse_events(answer.text)
            assert is_done, (body, chunks[-1])
        else:
            assert {choice["finish_reason"] for choice in answer.json()["choices"]} <= {"stop", "length", "deadline"}
