"""What the clients ask: requests of many kinds whose answers depend on nothing but themselves. Sends nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadtests.mixture import SETTLED_KINDS, mixed_request_of

# Long enough that a fault finds most of them under way.
_TOKENS = (120, 320)


@dataclass(frozen=True, slots=True)
class Question:
    """One request, and whether its answer comes in pieces."""

    kind: str
    body: bytes
    is_stream: bool


def questions(seed: int, count: int) -> list[Question]:
    """So many, of all kinds, and last one with a long answer; the same for the same seed."""
    rng = random.Random(f"chaos:{seed}")
    broad = {
        "prompt": "Once",
        "n": 4,
        "max_tokens": 400,
        "ignore_eos": True,
        "logprobs": 5,
        "seed": seed,
        "stream": True,
    }
    return [*(_question(rng, number) for number in range(count - 1)), question_of("broad", broad)]


def question_of(kind: str, body: Mapping[str, Any]) -> Question:
    return Question(kind, json.dumps(body).encode(), bool(body.get("stream")))


def _question(rng: random.Random, number: int) -> Question:
    mixed = mixed_request_of(SETTLED_KINDS[number % len(SETTLED_KINDS)], rng)
    body = json.loads(mixed.body)
    if body["max_tokens"]:
        body |= {"max_tokens": rng.randint(*_TOKENS)}
    if body["max_tokens"] and "stop" not in body and mixed.kind != "structured":
        body["ignore_eos"] = True
    return question_of(mixed.kind, body)
