"""A completion stream read after the fact: which events carried text and when, the usage, how it ended.

Knows server-sent events and the completions protocol, not HTTP. Most events are told apart by a byte search; only the
last ones and error events are parsed as JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from loadtests.connection import Answer

_EVENT = re.compile(rb"(.*?)(?:\r\n\r\n|\n\n|\r\r)", re.DOTALL)
_TEXT = re.compile(rb'"text":\s*"[^"]')
_TOKEN_IDS = re.compile(rb'"token_ids":\s*\[\s*\d')
_CONTINUOUS_USAGE = re.compile(rb'"usage":\s*\{')
_ERROR = re.compile(rb'(?:^|\n)(?:event:\s*error|error:)|"error":\s*[{"]')
NUM_LAST_EVENTS = 4
"""Where the finish reason and the usage are: the last text, the finish, the usage and `[DONE]`, in some order."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the server counted them. `cached_tokens` is None where it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class CompletionStream:
    """What a stream said.

    `times_s` are the arrivals of the events that carried text (or token ids, from a server without text), on
    `perf_counter`; an event has arrived with its last byte. `token_counts` are the tokens in each of them, where the
    server says so event by event. `error` is the message of an error event.
    """

    times_s: tuple[float, ...]
    token_counts: tuple[int, ...] | None
    usage: Usage | None
    finish_reason: str | None
    is_done: bool
    error: str | None


def read_stream(answer: Answer) -> CompletionStream:
    """Reads the events of `answer`, the last of which may be cut short."""
    events = _events(answer)
    last = [_json(data) for _, data in events[-NUM_LAST_EVENTS:]]
    carriers = [(time, data) for time, data in events if _carries_tokens(data)]
    return CompletionStream(
        times_s=tuple(time for time, _ in carriers),
        token_counts=_token_counts([data for _, data in carriers]),
        usage=next((usage for usage in map(_usage, reversed(last)) if usage is not None), None),
        finish_reason=next((reason for reason in map(_finish_reason, last) if reason is not None), None),
        is_done=any(data.strip().endswith(b"[DONE]") for _, data in events[-NUM_LAST_EVENTS:]),
        error=_first_error(answer.body, events),
    )


def error_message(body: bytes) -> str:
    """What an answer that is not a stream says went wrong, cut to one line."""
    parsed = _json(body)
    error = parsed.get("error", parsed.get("message", parsed.get("detail")))
    message = error.get("message", error) if isinstance(error, dict) else error
    text = str(message) if message else body[:200].decode(errors="replace")
    return " ".join(text.split())[:200]


def _carries_tokens(event: bytes) -> bool:
    """Whether an event has text, or ids in place of it. Inside a JSON string these quotes would be escaped."""
    at = event.find(b'"text":')
    if at < 0:
        return _TOKEN_IDS.search(event) is not None
    return _TEXT.match(event, at) is not None or _TOKEN_IDS.search(event) is not None


def _events(answer: Answer) -> list[tuple[float, bytes]]:
    """Each complete event of the body with the time at which its last byte came."""
    body = answer.body
    if b"\r" in body:
        body_events = [(found.end(), found.group(1)) for found in _EVENT.finditer(body)]
    else:
        parts = body.split(b"\n\n")[:-1]
        body_events = list(zip(accumulate(len(part) + 2 for part in parts), parts, strict=True))
    times_s = _arrival_times(answer, [end - 1 for end, _ in body_events])
    return [(time_s, event) for time_s, (_, event) in zip(times_s, body_events, strict=True) if event]


def _arrival_times(answer: Answer, offsets: list[int]) -> list[float]:
    """When the bytes at ascending `offsets` of the body came: one walk along chunks and arrivals."""
    spans, arrivals = iter(answer.spans), iter(answer.arrivals)
    times_s: list[float] = []
    body_end = received_end = shift = 0
    time_s = 0.0
    for offset in offsets:
        while offset >= body_end:
            start, end = next(spans)
            shift = start - body_end
            body_end += end - start
        while offset + shift >= received_end:
            received_end, time_s = next(arrivals)
        times_s.append(time_s)
    return times_s


def _json(event: bytes) -> dict[str, Any]:
    """The JSON object of an event's `data:` lines, or of a whole body; empty where there is none."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        value = json.loads(b"\n".join(lines) if lines else event)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(event: dict[str, Any]) -> Usage | None:
    usage = event.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(prompt, completion, cached if isinstance(cached, int) else None)


def _choice(event: dict[str, Any]) -> dict[str, Any]:
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _finish_reason(event: dict[str, Any]) -> str | None:
    reason = _choice(event).get("finish_reason")
    return reason if isinstance(reason, str) else None


def _token_counts(carriers: list[bytes]) -> tuple[int, ...] | None:
    """Tokens of each event, where every event tells by its token ids or by a running usage."""
    if not carriers:
        return None
    if all(_TOKEN_IDS.search(data) for data in carriers):
        return tuple(len(_choice(_json(data)).get("token_ids") or ()) for data in carriers)
    if not all(_CONTINUOUS_USAGE.search(data) for data in carriers):
        return None
    running = [0, *(usage.completion_tokens if (usage := _usage(_json(data))) else 0 for data in carriers)]
    counts = tuple(after - before for before, after in pairwise(running))
    return counts if min(counts) >= 0 else None


def _first_error(body: bytes, events: list[tuple[float, bytes]]) -> str | None:
    if b'"error"' not in body and b"error:" not in body and b"event:" not in body:
        return None
    return next((_error_message(data) for _, data in events if _ERROR.search(data)), None)


def _error_message(event: bytes) -> str:
    lines = event.splitlines()
    bare = next((line[6:] for line in lines if line.startswith(b"error:")), None)
    payload = bare if bare is not None else b"\n".join(line[5:] for line in lines if line.startswith(b"data:"))
    return error_message(payload or event)
