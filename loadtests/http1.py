"""As much of HTTP/1.1 as reading one answer takes: the head, and where its body lies in the bytes received.

Pure functions over bytes. Nothing here looks at the body's content.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MAX_HEAD_BYTES = 64 * 1024


class MalformedResponse(Exception):  # noqa: N818 - an answer, not a fault of this program
    """The bytes are not an HTTP/1.1 answer."""


class Framing(Enum):
    """What ends a body."""

    CHUNKED = "chunked"
    LENGTH = "length"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and the header fields that matter. `end` is the offset of the body's first byte."""

    status: int
    framing: Framing
    length: int
    keep_alive: bool
    end: int


def parse_head(received: bytes) -> Head | None:
    """The head at the start of `received`, None while it is incomplete. Raises MalformedResponse."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        if len(received) > MAX_HEAD_BYTES:
            raise MalformedResponse("a head without end")
        return None
    first, *lines = received[:end].split(b"\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    version, _, rest = first.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise MalformedResponse(f"status line {first[:80]!r}")
    framing, length = _framing(fields)
    closes = fields.get(b"connection", b"").lower() == b"close" or version == b"HTTP/1.0" or framing is Framing.CLOSE
    return Head(int(rest[:3]), framing, length, not closes, end + 4)


def _framing(fields: dict[bytes, bytes]) -> tuple[Framing, int]:
    if b"chunked" in fields.get(b"transfer-encoding", b"").lower():
        return Framing.CHUNKED, 0
    if b"content-length" not in fields:
        return Framing.CLOSE, 0
    if not fields[b"content-length"].isdigit():
        raise MalformedResponse(f"content-length {fields[b'content-length'][:40]!r}")
    return Framing.LENGTH, int(fields[b"content-length"])


Span = tuple[int, int]
"""A piece of the body: where it starts and ends in the bytes received."""


def chunk_spans(received: bytes, start: int) -> tuple[list[Span], bool]:
    """The chunks of a chunked body that begins at `start`, and whether its last chunk and trailer are there."""
    spans: list[Span] = []
    at = start
    num_received = len(received)
    while (line_end := received.find(b"\r\n", at)) >= 0:
        size = _chunk_size(received[at:line_end])
        if size == 0:
            return spans, received.startswith(b"\r\n", line_end + 2) or b"\r\n\r\n" in received[line_end + 2 :]
        end = line_end + 2 + size
        if end + 2 > num_received:
            break
        spans.append((line_end + 2, end))
        at = end + 2
    return spans, False


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise MalformedResponse(f"chunk size {line[:40]!r}") from None
