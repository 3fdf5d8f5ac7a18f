"""Requests of many kinds in random order, each with what its answer must be. For a server of text with all its fields.

Sends nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from loadtests.stream import error_message


class Outcome(Enum):
    """How an exchange has to end."""

    ANSWERED = "answered"
    """Status 200, and each choice finished exactly once."""
    REFUSED = "refused"
    """Status 400 in the shape of an error."""
    LEFT = "left"
    """The client hangs up before the end."""


@dataclass(frozen=True, slots=True)
class MixedRequest:
    """One request. `leaves_after_s` is when a client that does not stay hangs up."""

    kind: str
    body: bytes
    outcome: Outcome
    num_choices: int = 1
    is_stream: bool = False
    leaves_after_s: float | None = None


_SHARED = "Once upon a time, in a village by the sea, there lived a girl who knew every boat and every bird by name. "
_OPENINGS = (
    "The fox",
    "A small boat",
    "Ben and his dog",
    "In the morning",
    "Nobody knew why",
    "The old lamp",
    "Rain fell",
)
_WORDS = ("and", "then", "the", "river", "sang", "to", "a", "blue", "bird", "while", "children", "ran", "home", "again")
_Make = Callable[[random.Random], MixedRequest]


def mixed_request(rng: random.Random) -> MixedRequest:
    """Any kind, drawn by `rng`; short ones are the most common."""
    return rng.choices(_KINDS, _WEIGHTS)[0](rng)


def _text(rng: random.Random, max_words: int = 40) -> str:
    return " ".join([rng.choice(_OPENINGS), *rng.choices(_WORDS, k=rng.randint(1, max_words))])


def _body(rng: random.Random, **fields: Any) -> dict[str, Any]:
    body = {"prompt": _text(rng), "max_tokens": rng.randint(1, 64), "seed": rng.randrange(2**31)}
    return {**body, "temperature": rng.choice((0, 0.7, 1.3)), **fields}


def _answered(kind: str, body: dict[str, Any], num_choices: int = 1) -> MixedRequest:
    return MixedRequest(kind, _encoded(body), Outcome.ANSWERED, num_choices, bool(body.get("stream")))


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _stream(rng: random.Random) -> MixedRequest:
    return _answered("stream", _body(rng, stream=True, stream_options={"include_usage": rng.random() < 0.5}))


def _whole(rng: random.Random) -> MixedRequest:
    return _answered("whole", _body(rng))


def _choices(rng: random.Random) -> MixedRequest:
    n = rng.randint(2, 6)
    return _answered("choices", _body(rng, n=n, temperature=1, stream=rng.random() < 0.5), n)


def _prompts(rng: random.Random) -> MixedRequest:
    prompts = [_text(rng) for _ in range(rng.randint(2, 5))]
    return _answered("prompts", _body(rng, prompt=prompts), len(prompts))


def _scored(rng: random.Random) -> MixedRequest:
    scoring = {"max_tokens": 0} if rng.random() < 0.5 else {}
    return _answered("scored", _body(rng, echo=True, logprobs=rng.randint(0, 5), **scoring))


def _penalised(rng: random.Random) -> MixedRequest:
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"7": -5}}
    return _answered("penalised", _body(rng, **penalties, top_k=40, top_p=0.9, bad_words=["the"], stop=["\n", "end"]))


def _structured(rng: random.Random) -> MixedRequest:
    asked = rng.choice(
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
            {"structured_outputs": {"regex": "[a-z]{2,8}( [a-z]{2,8})*"}},
        )
    )
    return _answered("structured", _body(rng, **asked, stream=rng.random() < 0.5))


def _shared_prefix(rng: random.Random) -> MixedRequest:
    return _answered("shared prefix", _body(rng, prompt=_SHARED * rng.randint(1, 6) + _text(rng, 8), stream=True))


def _deadline(rng: random.Random) -> MixedRequest:
    body = _body(rng, max_tokens=256, ignore_eos=True, timeout=rng.uniform(0.01, 0.5), stream=rng.random() < 0.5)
    return _answered("deadline", body)


def _gone(rng: random.Random) -> MixedRequest:
    body = _body(rng, max_tokens=256, ignore_eos=True, stream=rng.random() < 0.7, n=rng.randint(1, 3))
    return MixedRequest("gone", _encoded(body), Outcome.LEFT, leaves_after_s=rng.expovariate(5))


def _wrong(rng: random.Random) -> MixedRequest:
    good = _body(rng)
    body: bytes = rng.choice(
        (
            _encoded({**good, "max_tokens": -1}),
            _encoded({**good, "prompt": []}),
            _encoded({**good, "prompt": "a " * 100_000}),
            _encoded({**good, "no_such_field": 1}),
            _encoded({**good, "logit_bias": {"x": 1}}),
            _encoded({**good, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}),
            _encoded({**good, "structured_outputs": {"regex": "(("}}),
            b"[" * 20_000,
            _encoded(good)[:-3],
            b"\xff\xfe" + _encoded(good),
        )
    )
    return MixedRequest("wrong", body, Outcome.REFUSED)


_KINDS: Sequence[_Make] = (
    *(_stream, _whole, _choices, _prompts, _scored, _penalised, _structured, _shared_prefix, _deadline, _gone, _wrong),
)
_WEIGHTS = (8, 4, 2, 2, 2, 2, 2, 4, 2, 4, 2)


SETTLED_KINDS: Sequence[str] = (
    *("stream", "whole", "choices", "prompts", "scored", "penalised", "structured", "shared prefix"),
)
"""Those whose answers depend on nothing but the request."""


def mixed_request_of(kind: str, rng: random.Random) -> MixedRequest:
    """One of `SETTLED_KINDS`."""
    return _KINDS[SETTLED_KINDS.index(kind)](rng)


def fault(request: MixedRequest, status: int, body: bytes) -> str | None:
    """What is wrong with a whole answer to `request`; None if it is as it has to be."""
    if request.outcome is Outcome.REFUSED:
        return None if status == 400 and error_message(body) else f"status {status} for a wrong request"
    if status != 200:
        return f"status {status}: {error_message(body)}"
    try:
        finishes = _stream_finishes(body) if request.is_stream else _finishes(json.loads(body))
    except (ValueError, KeyError, TypeError) as error:
        return f"not an answer: {type(error).__name__} {error}"
    expected = dict.fromkeys(range(request.num_choices), 1)
    return None if finishes == expected else f"choices finished {finishes}, not each once"


def _finishes(answer: dict[str, Any]) -> dict[int, int]:
    """How often each choice finished."""
    counts: dict[int, int] = {}
    for choice in answer["choices"]:
        if choice["finish_reason"] is not None:
            counts[choice["index"]] = counts.get(choice["index"], 0) + 1
    return counts


def _stream_finishes(body: bytes) -> dict[int, int]:
    events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise ValueError(f"the stream ends with {events[-1:]!r}")
    counts: dict[int, int] = {}
    for event in events[:-1]:
        for index, count in _finishes(json.loads(event)).items():
            counts[index] = counts.get(index, 0) + count
    return counts
