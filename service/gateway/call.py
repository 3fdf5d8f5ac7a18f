"""Calls the gateway's application from this process, without a socket: the same answers as over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Headers
    body: bytes


async def post_json(app: ASGIApp, path: str, body: bytes) -> Answer:
    """Sends `body`, a JSON document, to `path` and waits for the answer. Cancelling it is a client that goes away."""
    is_sent = False
    status, headers, parts = 0, Headers(), list[bytes]()

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            await asyncio.Event().wait()  # This client never goes away by itself.
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], Headers(raw=message["headers"])
        else:
            parts.append(message.get("body", b""))

    await app(_scope(path, len(body)), receive, send)
    return Answer(status, headers, b"".join(parts))


def _scope(path: str, num_bytes: int) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(num_bytes).encode())],
        "client": None,
        "server": None,
        "state": {},
    }
