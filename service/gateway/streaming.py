"""Server-sent events: the bytes of each chunk, made from a template filled once for each request."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from service.gateway.choice import Delta
from service.gateway.errors import ApiError
from service.gateway.plan import CompletionPlan

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
DONE = b"data: [DONE]\n\n"

_UNFINISHED = b',"logprobs":null,"finish_reason":null,"stop_reason":null}'


def completion_head(plan: CompletionPlan, fingerprint: str) -> dict[str, object]:
    """The fields that all chunks of an answer and the whole answer have in common."""
    return {
        "id": plan.request_id,
        "object": "text_completion",
        "created": plan.created,
        "model": plan.model,
        "system_fingerprint": fingerprint,
        "seed": plan.seed,
    }


class ChunkEncoder:
    """Makes the events of one answer. A token costs the encoding of its text and one join."""

    def __init__(self, plan: CompletionPlan, fingerprint: str) -> None:
        head = orjson.dumps(completion_head(plan, fingerprint)).removesuffix(b"}")
        self._head = b"data: " + head + b',"choices":['
        usage = b',"usage":null' if plan.include_usage else b""
        self._tail = b"]" + usage + b"}\n\n"

    def delta(self, delta: Delta) -> bytes:
        """One event with the new text of one choice."""
        if delta.finish_reason is None and delta.token_ids is None:
            choice = b'{"index":%d,"text":%b%b' % (delta.choice_index, orjson.dumps(delta.text), _UNFINISHED)
        else:
            choice = orjson.dumps(choice_body(delta))
        return b"%b%b%b" % (self._head, choice, self._tail)

    def usage(self, usage: Mapping[str, int]) -> bytes:
        """The event with no choice and the usage of all."""
        return b'%b],"usage":%b}\n\n' % (self._head, orjson.dumps(usage))


def choice_body(delta: Delta) -> dict[str, object]:
    """A choice as JSON, whole or what is new of it."""
    body: dict[str, object] = {
        "index": delta.choice_index,
        "text": delta.text,
        "logprobs": None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
    if delta.token_ids is not None:
        body["token_ids"] = delta.token_ids
    return body


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that failed."""
    return b"data: %b\n\n" % orjson.dumps(error.body())
