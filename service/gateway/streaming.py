"""Server-sent events: the bytes of each chunk, made from a template filled once for each request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import orjson

from service.gateway.answer import AnswerWriter
from service.gateway.choice import Delta
from service.gateway.errors import ApiError
from service.gateway.plan import CompletionPlan

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
DONE = b"data: [DONE]\n\n"

_UNFINISHED = b',"logprobs":null,"finish_reason":null,"stop_reason":null}%b'


class ChunkEncoder:
    """Makes the events of one answer. Of a token alone, only its text is encoded."""

    def __init__(self, plan: CompletionPlan, writer: AnswerWriter) -> None:
        self._writer = writer
        self._head = b"data: " + orjson.dumps(writer.head()).removesuffix(b"}") + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if plan.include_usage else b"]}\n\n"
        self._is_plain = plan.shape.is_plain
        self._begun: set[int] = set()
        # What comes before and after the text of a piece that has nothing else, by choice.
        self._frames = [
            (b'%b{"index":%d,"text":' % (self._head, index), _UNFINISHED % self._tail)
            for index in range(len(plan.requests) if self._is_plain else 0)
        ]

    def events(self, deltas: Iterable[Delta], usage: Mapping[str, object] | None = None) -> bytes:
        """One event for each delta, with `usage` in it where that is given."""
        if usage is None:
            return b"".join([self._event(delta) for delta in deltas])
        tail = b'],"usage":%b}\n\n' % orjson.dumps(usage)
        return b"".join([b"%b%b%b" % (self._head, self._choice(delta), tail) for delta in deltas])

    def usage(self, usage: Mapping[str, object]) -> bytes:
        """The event with no choice and the usage of all."""
        return b'%b],"usage":%b}\n\n' % (self._head, orjson.dumps(usage))

    def _event(self, delta: Delta) -> bytes:
        if self._is_plain and delta.finish_reason is None and delta.token_ids is None:
            before, after = self._frames[delta.choice_index]
            return before + orjson.dumps(delta.text) + after
        return b"%b%b%b" % (self._head, self._choice(delta), self._tail)

    def _choice(self, delta: Delta) -> bytes:
        is_first = delta.choice_index not in self._begun
        self._begun.add(delta.choice_index)
        return orjson.dumps(self._writer.piece(delta, is_first=is_first))


# A comment, which clients skip: a sign of life for them and for what lies between.
KEEP_ALIVE = b": keep-alive\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that failed."""
    return b"data: %b\n\n" % orjson.dumps(error.body())
