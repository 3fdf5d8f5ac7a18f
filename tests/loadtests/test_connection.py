"""Answers cut into pieces anywhere are read alike, and every byte keeps its time."""

import asyncio
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loadtests.connection
from loadtests.connection import Answer, Connection, Disconnected
from loadtests.http1 import Framing, MalformedResponse, chunk_spans, parse_head
from loadtests.stream import read_stream

EVENTS = [f'data: {{"choices":[{{"text":"w{i}"}}]}}'.encode() for i in range(4)]
END = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}'


class SilentTransport(asyncio.Transport):
    """Takes what is written and sends nothing."""

    def write(self, data: object) -> None: ...

    def abort(self) -> None: ...


def stream_bytes(newline: bytes, chunk_sizes: list[int] | None) -> bytes:
    """A whole answer; its body in chunks of the given sizes, or up to the end of the connection."""
    body = b"".join(event + newline * 2 for event in (*EVENTS, END, b"data: [DONE]"))
    if chunk_sizes is None:
        return b"HTTP/1.1 200 OK\r\n\r\n" + body
    bounds = [0, *(bound for bound in accumulate(chunk_sizes) if bound < len(body)), len(body)]
    chunks = [body[start:end] for start, end in pairwise(bounds)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def receive(data: bytes, cuts: list[int], monkeypatch: pytest.MonkeyPatch, *, closes: bool = False) -> Answer:
    """Feeds `data` in pieces, piece n at second n."""

    async def feed() -> Answer:
        connection = Connection()
        connection.connection_made(SilentTransport())
        waiting = asyncio.ensure_future(connection.exchange(b""))
        await asyncio.sleep(0)
        bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
        for second, (start, end) in enumerate(pairwise(bounds)):
            monkeypatch.setattr(loadtests.connection, "perf_counter", lambda second=second: float(second))
            connection.data_received(data[start:end])
        if closes:
            connection.connection_lost(None)
        return await asyncio.wait_for(waiting, 60)

    return asyncio.run(feed())


@settings(max_examples=150, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 600), max_size=12),
    chunk_sizes=st.none() | st.lists(st.integers(1, 80), min_size=1, max_size=30),
    newline=st.sampled_from([b"\n", b"\r\n"]),
)
def test_pieces_chunks_and_line_ends_change_nothing(
    cuts: list[int], chunk_sizes: list[int] | None, newline: bytes
) -> None:
    data = stream_bytes(newline, chunk_sizes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        answer = receive(data, cuts, monkeypatch, closes=chunk_sizes is None)
    stream = read_stream(answer)
    assert len(stream.times_s) == 4
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 4
    assert stream.is_done
    assert stream.error is None
    assert list(stream.times_s) == [expected_time(data, cuts, newline, i) for i in range(4)]


def expected_time(data: bytes, cuts: list[int], newline: bytes, event: int) -> float:
    """The number of the piece that holds the last byte of an event, found the slow way: by cutting there.

    An event is whole with the bytes received up to a bound if the body of those bytes holds its blank line.
    """
    bounds = [*sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    whole = b"".join(each + newline * 2 for each in EVENTS[: event + 1])
    for second, bound in enumerate(bounds):
        if len(body_until(data, bound)) >= len(whole):
            return float(second)
    raise AssertionError("never whole")


def body_until(data: bytes, bound: int) -> bytes:
    """The body bytes among the first `bound` bytes, byte by byte."""
    head_end = data.index(b"\r\n\r\n") + 4
    if b"chunked" not in data[:head_end]:
        return data[head_end:bound]
    body, at = b"", head_end
    while at < bound:
        line_end = data.index(b"\r\n", at)
        size = int(data[at:line_end], 16)
        if size == 0:
            break
        body += data[line_end + 2 : min(line_end + 2 + size, max(bound, line_end + 2))]
        at = line_end + 2 + size + 2
    return body


def test_a_last_chunk_cut_anywhere_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream_bytes(b"\n", [1000])
    for cut in range(len(data) - 8, len(data)):
        assert receive(data, [cut], monkeypatch).received == data


def test_trailers_belong_to_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream_bytes(b"\n", [1000]).removesuffix(b"\r\n") + b"X-Time: 1\r\n\r\n"
    for cuts in ([], [60], [len(data) - 30]):
        assert receive(data, cuts, monkeypatch).received == data


def test_a_body_of_known_length(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\nhello"
    answer = receive(data, [10, 41], monkeypatch)
    assert (answer.head.status, answer.body) == (503, b"hello")


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"x" * 70_000],
)
def test_what_is_not_http_is_refused(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MalformedResponse):
        receive(data, [], monkeypatch)


def test_a_chunk_size_that_is_none_is_refused() -> None:
    with pytest.raises(MalformedResponse):
        chunk_spans(b"zz\r\nab\r\n", 0)


def test_an_answer_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadtests.connection, "MAX_RESPONSE_BYTES", 100)
    with pytest.raises(OverflowError):
        receive(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200, [], monkeypatch)


def test_a_connection_cut_in_the_middle_keeps_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream_bytes(b"\n", [45, 45, 1000])
    with pytest.raises(Disconnected) as caught:
        receive(data[:150], [], monkeypatch, closes=True)
    assert caught.value.received is not None
    assert caught.value.received.head.status == 200
    assert len(read_stream(caught.value.received).times_s) == 2


@pytest.mark.parametrize(
    ("fields", "framing", "keep_alive"),
    [
        (b"Content-Length: 2\r\n", Framing.LENGTH, True),
        (b"Content-Length: 2\r\nConnection: close\r\n", Framing.LENGTH, False),
        (b"transfer-encoding: CHUNKED\r\n", Framing.CHUNKED, True),
        (b"", Framing.CLOSE, False),
    ],
)
def test_heads(fields: bytes, framing: Framing, keep_alive: bool) -> None:
    head = parse_head(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
    assert head is not None
    assert (head.framing, head.keep_alive) == (framing, keep_alive)
