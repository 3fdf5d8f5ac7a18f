"""A client that stops reading in the middle of an answer, with as small a buffer as the kernel gives."""

from __future__ import annotations

import asyncio
import socket

from loadtests.http1 import MalformedResponse, chunk_spans, parse_head
from loadtests.target import Target

_BUFFER_BYTES = 4096
_TIMEOUT_S = 90.0


async def read_slowly(target: Target, body: bytes, pause_s: float, *, leaves: bool) -> tuple[int, bytes]:
    """Status and body of a streamed completion of which nothing is read for `pause_s` after its first bytes.

    One that `leaves` hangs up after the pause, with what has come. Raises OSError, TimeoutError or MalformedResponse.
    """
    async with asyncio.timeout(_TIMEOUT_S):
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            await loop.sock_connect(sock, (target.address, target.port))
            head = f"POST {target.prefix}/v1/completions HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n"
            fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            await loop.sock_sendall(sock, (head + fields).encode() + body)
            received = [await loop.sock_recv(sock, _BUFFER_BYTES)]
            await asyncio.sleep(pause_s)
            while not leaves and received[-1]:
                received.append(await loop.sock_recv(sock, 2**16))
    return _parsed(b"".join(received))


def _parsed(received: bytes) -> tuple[int, bytes]:
    head = parse_head(received)
    if head is None:
        raise MalformedResponse("an answer without a head")
    spans, _ = chunk_spans(received, head.end)
    if not spans:
        return head.status, received[head.end :]
    return head.status, b"".join(received[start:end] for start, end in spans)
