"""What one exchange came to: an answer put together from its pieces, and whether it kept the server's promise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from loadtests.chaos.question import Question


class Outcome(Enum):
    """How a request ended, as its client saw it."""

    FINISHED = "finished"
    """The whole answer, with the bytes that an undisturbed server gives."""
    REFUSED = "refused"
    """Turned away before it was accepted, for want of room."""
    FAILED = "failed"
    """One clear error, after a right beginning where there was one."""
    CUT = "cut"
    """Its connection ended early, with the gateway that it led to and that was broken."""
    LOST = "lost"
    """Anything else: no end, two ends, wrong bytes."""


_REFUSALS = frozenset({"overloaded", "queue_share_exceeded", "draining"})


@dataclass(frozen=True, slots=True)
class Choice:
    """One text of an answer, with all that was said of its tokens."""

    text: str
    logprobs: str
    ends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer. `tokens` are prompt and completion tokens as the server counted them, where it said so."""

    choices: dict[int, Choice]
    tokens: tuple[int, int] | None
    errors: tuple[str, ...]
    is_ended: bool


def outcome(question: Question, reference: Reading, status: int, body: bytes) -> tuple[Outcome, str]:
    """What a complete exchange came to, and the reason where it is not an answer."""
    if status != 200:
        return _error(status, body)
    try:
        reading = read(question, body)
    except (ValueError, KeyError, TypeError) as error:
        return Outcome.LOST, f"not an answer: {type(error).__name__} {error}"
    if reading == reference:
        return Outcome.FINISHED, ""
    if len(reading.errors) == 1 and not reading.is_ended:
        is_beginning = all(reference.choices[i].text.startswith(c.text) for i, c in reading.choices.items())
        return (Outcome.FAILED, reading.errors[0]) if is_beginning else (Outcome.LOST, "an error after wrong bytes")
    return Outcome.LOST, _difference(reference, reading)


def read(question: Question, body: bytes) -> Reading:
    """Raises ValueError, KeyError or TypeError where `body` is no answer."""
    if not question.is_stream:
        return _read_events([json.loads(body)], is_ended=True)
    events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    is_ended = bool(events) and events[-1] == b"[DONE]"
    return _read_events([json.loads(event) for event in events if event != b"[DONE]"], is_ended=is_ended)


def _read_events(events: list[dict[str, Any]], *, is_ended: bool) -> Reading:
    pieces: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        for piece in event.get("choices", ()):
            pieces.setdefault(piece["index"], []).append(piece)
    usage = [event["usage"] for event in events if event.get("usage")]
    tokens = (usage[-1]["prompt_tokens"], usage[-1]["completion_tokens"]) if usage else None
    errors = tuple(event["error"]["message"] for event in events if "error" in event)
    return Reading({index: _choice(found) for index, found in sorted(pieces.items())}, tokens, errors, is_ended)


def _choice(pieces: list[dict[str, Any]]) -> Choice:
    ends = tuple(piece["finish_reason"] for piece in pieces if piece["finish_reason"])
    scores: dict[str, list[Any]] = {}
    for piece in pieces:
        for name, values in (piece.get("logprobs") or {}).items():
            scores.setdefault(name, []).extend(values or ())
    return Choice("".join(piece["text"] for piece in pieces), json.dumps(scores), ends)


def _error(status: int, body: bytes) -> tuple[Outcome, str]:
    try:
        error = json.loads(body)["error"]
        text = f"{status} {error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return Outcome.LOST, f"status {status} without an error of the one shape"
    return (Outcome.REFUSED if error["code"] in _REFUSALS else Outcome.FAILED), text


def _difference(reference: Reading, reading: Reading) -> str:
    for index, choice in reference.choices.items():
        found = reading.choices.get(index)
        if found != choice:
            what = "nothing" if found is None else f"{len(found.text)} characters, ends {found.ends}"
            return f"choice {index}: {what}, not {len(choice.text)} characters, ends {choice.ends}"
    return f"{reading.tokens}, ended: {reading.is_ended}, not {reference.tokens}, ended: {reference.is_ended}"
