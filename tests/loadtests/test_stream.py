"""What servers of different make put into their streams."""

import json

import pytest

from loadtests.connection import Answer
from loadtests.http1 import Framing, Head
from loadtests.stream import Usage, error_message, read_stream


def answer(*events: object, newline: str = "\n", ending: str = "data: [DONE]\n\n") -> Answer:
    """An answer whose event n came at second n."""
    pieces = [f"data: {json.dumps(event)}{newline * 2}".encode() for event in events] + [ending.encode()]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    body = b"".join(pieces)
    head = Head(200, Framing.CLOSE, 0, keep_alive=False, end=0)
    return Answer(head, body, ((0, len(body)),), tuple((end, float(i)) for i, end in enumerate(ends)))


def text(words: str, **fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": None}], **fields}


def usage(completion_tokens: int, **fields: object) -> dict[str, object]:
    return {"prompt_tokens": 5, "completion_tokens": completion_tokens, **fields}


def test_an_event_without_text_is_no_token() -> None:
    stream = read_stream(answer(text(""), text("a"), text(""), text("b"), {"choices": [], "usage": usage(4)}))
    assert stream.times_s == (1.0, 3.0)
    assert stream.usage == Usage(5, 4)
    assert stream.token_counts is None


def test_text_that_looks_like_the_protocol_is_text() -> None:
    stream = read_stream(answer(text('"text":"" "error": {"x'), text('\n\ndata: [DONE]\n\n"token_ids":[1]')))
    assert stream.times_s == (0.0, 1.0)
    assert stream.error is None


def test_spaces_after_colons_do_not_matter() -> None:
    compact = b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":""}]}\n\n'
    head = Head(200, Framing.CLOSE, 0, keep_alive=False, end=0)
    assert read_stream(Answer(head, compact, ((0, len(compact)),), ((len(compact), 1.0),))).times_s == (1.0,)


def test_token_ids_stand_for_text_and_are_counted() -> None:
    events = [{"choices": [{"text": "", "token_ids": ids}]} for ids in ([1, 2], [3], [])]
    stream = read_stream(answer(*events))
    assert stream.times_s == (0.0, 1.0)
    assert stream.token_counts == (2, 1)


def test_a_running_usage_counts_the_tokens_of_each_event() -> None:
    stream = read_stream(answer(*(text("a", usage=usage(count)) for count in (1, 4, 6))))
    assert stream.token_counts == (1, 3, 2)
    assert stream.usage == Usage(5, 6)


def test_cached_tokens_are_read() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 3}}
    assert read_stream(answer({"choices": [], "usage": usage(1, **details)})).usage == Usage(5, 1, 3)


def test_the_finish_reason_is_found_before_the_usage() -> None:
    finish = {"choices": [{"text": "", "finish_reason": "length"}]}
    assert read_stream(answer(text("a"), finish, {"choices": [], "usage": usage(1)})).finish_reason == "length"


@pytest.mark.parametrize(
    "ending",
    [
        'data: {"error": {"message": "it broke", "code": 500}}\n\n',
        'event: error\ndata: {"message": "it broke"}\n\n',
        'error: {"code": 500, "message": "it broke"}\n\n',
        'data: {"error": "it broke"}\n\n',
    ],
)
def test_errors_in_a_stream(ending: str) -> None:
    stream = read_stream(answer(text("a"), ending=ending))
    assert stream.error == "it broke"
    assert not stream.is_done


def test_an_event_cut_short_is_no_event() -> None:
    stream = read_stream(answer(text("a"), ending='data: {"choices":[{"text":"b"'))
    assert stream.times_s == (0.0,)
    assert not stream.is_done


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no such model"}}', "no such model"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>\n  busy</html>", "<html> busy</html>"),
        (b"[1]", "[1]"),
        (b'{"error": {"message": "' + b"x" * 900 + b'"}}', "x" * 200),
    ],
)
def test_error_messages(body: bytes, message: str) -> None:
    assert error_message(body) == message
