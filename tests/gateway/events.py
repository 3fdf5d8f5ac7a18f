"""Reading server-sent events strictly: anything a client would not expect is an AssertionError."""

from __future__ import annotations

import json
from typing import Any

import httpx

Chunk = dict[str, Any]


def stream_chunks(client: httpx.Client, body: dict[str, Any]) -> list[Chunk]:
    """The chunks of a streamed completion that ends as it should."""
    chunks, is_done = read_stream(client, body)
    assert is_done, chunks[-1]
    return chunks


def read_stream(client: httpx.Client, body: dict[str, Any]) -> tuple[list[Chunk], bool]:
    """All events of a streamed completion, and whether [DONE] was the last."""
    answer = client.post("/v1/completions", json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return parse_events(answer.text)


def parse_events(text: str) -> tuple[list[Chunk], bool]:
    """The JSON of every event, and whether [DONE] was the last event."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events), events
    data = [event.removeprefix("data: ") for event in events]
    is_done = data[-1] == "[DONE]"
    return [json.loads(item) for item in (data[:-1] if is_done else data)], is_done


def texts(chunks: list[Chunk]) -> dict[int, str]:
    """The joined text of each choice."""
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


def finals(chunks: list[Chunk]) -> dict[int, Chunk]:
    """The chunk's choice that finished each choice; AssertionError where one finishes twice or speaks afterwards."""
    finished: dict[int, Chunk] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert choice["index"] not in finished, "text after the end"
            if choice["finish_reason"] is not None:
                finished[choice["index"]] = choice
    return finished
