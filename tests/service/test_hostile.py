"""What bad clients send to a real server: every answer has its status and the one shape, and nothing stays behind."""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtests.exposition import gauge_sum
from loadtests.procfs import read_pss_bytes
from tests.service.process import ServerProcess

MIB = 2**20
PATH = "/v1/completions"
GOOD = {"prompt": "Once", "max_tokens": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--local", "--threads", "1") as server:
        yield server


@pytest.fixture(autouse=True)
def is_well_afterwards(server: ServerProcess) -> Iterator[None]:
    """After every test the server is healthy, holds nothing for anybody, and answers."""
    yield
    deadline = time.monotonic() + 30
    while held := what_is_held(server):
        assert time.monotonic() < deadline, held
        time.sleep(0.1)
    assert httpx.get(server.url + "/health", timeout=30).status_code == 200
    assert httpx.post(server.url + PATH, json=GOOD, timeout=60).status_code == 200
    assert "Traceback" not in server.output


def what_is_held(server: ServerProcess) -> dict[str, float]:
    text = httpx.get(server.url + "/metrics", timeout=30).text
    held = {
        "running": gauge_sum(text, "mosaic_num_requests_running"),
        "waiting": gauge_sum(text, "mosaic_num_requests_waiting"),
        "in flight": gauge_sum(text, "mosaic_num_completions_in_flight"),
        "blocks": gauge_sum(text, "mosaic_memory_blocks", state="used"),
        "slots": gauge_sum(text, "mosaic_state_slots", state="used"),
    }
    return {name: number for name, number in held.items() if number}


def exchange(server: ServerProcess, sent: bytes, timeout_s: float = 60) -> tuple[int, bytes, bytes]:
    """Sends bytes as they are; status, head and body of the first answer. Status 0: the server hung up without one."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as sock:
        sock.sendall(sent)
        received = b""
        while b"\r\n\r\n" not in received:
            piece = sock.recv(65536)
            if not piece:
                return 0, received, b""
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        while length and len(body) < int(length[1]) and (piece := sock.recv(65536)):
            body += piece
        return int(head.split()[1]), head, body


def post(body: bytes, *headers: str, path: str = PATH) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def assert_refused(status: int, body: bytes, expected: int) -> None:
    error = json.loads(body)["error"]
    assert status == expected, body[:300]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500


ANSWERS = {
    "a page": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "a file": (b"GET /static/playground.js HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "a probe": (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "metrics": (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "data": (b"GET /dashboard/data HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "a completion": (post(json.dumps(GOOD).encode()), 200),
    "a stream": (post(json.dumps(GOOD | {"stream": True}).encode()), 200),
    "nothing there": (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a bad body": (post(b"{"), 400),
    "a name not its own": (b"GET / HTTP/1.1\r\nHost: attacker.example\r\n\r\n", 403),
    "not HTTP": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    "a long head": (b"GET / HTTP/1.1\r\nX: " + b"x" * 1_000_000, 431),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_says_how_to_take_it_and_nothing_of_what_gave_it(server: ServerProcess, name: str) -> None:
    sent, expected = ANSWERS[name]
    status, head, _ = exchange(server, sent)
    headers = httpx.Headers([line.split(b": ", 1) for line in head.split(b"\r\n")[1:]])
    assert status == expected
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] in ("no-store", "no-cache")
    assert headers["content-type"]
    assert not {"server", "x-powered-by", "via", "set-cookie", "access-control-allow-origin"} & headers.keys()
    assert not re.search(rb"uvicorn|python|starlette|fastapi", head, re.IGNORECASE)
    if name in ("a page", "a file"):
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]


NESTED = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BODIES = {
    "nothing": (b"", 400),
    "half": (b'{"prompt": "x"', 400),
    "a word": (b"null", 400),
    "an array": (b"[]", 400),
    "deep arrays": (NESTED, 400),
    "deep objects": (b'{"prompt":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400),
    "bad UTF-8": (b'{"prompt": "\xff\xfe"}', 400),
    "half a surrogate": (b'{"prompt": "\\ud800", "max_tokens": 2}', 400),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', 400),
    "infinity": (b'{"prompt": "x", "temperature": 1e999}', 400),
    "many digits": (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
    "a huge seed": (b'{"prompt": "x", "seed": 1e300}', 400),
    "twice the same key": (b'{"prompt": "x", "max_tokens": 2, "max_tokens": -2}', 400),
    "too long a prompt": (json.dumps({"prompt": "word " * 300_000}).encode(), 400),
    "too many ids": (json.dumps({"prompt": [1] * 500_000}).encode(), 400),
    "too many prompts": (json.dumps({"prompt": ["x"] * 100_000}).encode(), 400),
    "a long unknown name": (b'{"prompt": "x", "' + b"n" * 100_000 + b'": 1}', 400),
    "many unknown names": (json.dumps({"prompt": "x"} | {f"n{i}": i for i in range(20_000)}).encode(), 400),
    "more than allowed": (json.dumps({"prompt": "x" * (5 * MIB)}).encode(), 413),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_nobody_should_send(server: ServerProcess, name: str) -> None:
    body, expected = BODIES[name]
    status, _, answer = exchange(server, post(body))
    assert_refused(status, answer, expected)


REQUESTS = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", 400),
    "no path": (b"GET HTTP/1.1\r\n\r\n", 400),
    "a head without end": (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 40_000, 431),
    "a path without end": (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", 431),
    "a length that is no number": (post(b"{}", "Content-Length: many"), 400),
    "a negative length": (post(b"{}", "Content-Length: -5"), 400),
    "two lengths": (post(b"{}", "Content-Length: 2", "Content-Length: 3"), 400),
    "a chunk size that is none": (post(b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), 400),
    "a promise of too much": (post(b"{}", f"Content-Length: {10**12}"), 413),
    "text": (post(b"{}").replace(b"application/json", b"text/plain"), 415),
    "another method": (b"DELETE /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "a way out": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a NUL in the path": (b"GET /v1/models/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_nobody_should_send(server: ServerProcess, name: str) -> None:
    sent, expected = REQUESTS[name]
    status, _, answer = exchange(server, sent)
    assert_refused(status, answer, expected)


CHUNK = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"


def test_chunks_that_come_to_too_much_are_refused(server: ServerProcess) -> None:
    status, _, answer = exchange(server, post(CHUNK * 80 + b"0\r\n\r\n", "Transfer-Encoding: chunked"))
    assert_refused(status, answer, 413)


def test_chunks_without_end_are_cut_off(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        endless = itertools.chain([post(CHUNK, "Transfer-Encoding: chunked")], itertools.repeat(CHUNK, 10_000))
        with pytest.raises(ConnectionError):
            collections.deque(map(sock.sendall, endless), maxlen=0)


def test_pipelined_requests_are_each_answered(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(post(json.dumps(GOOD).encode()) * 5 + post(b"{", "Connection: close"))
        received = b""
        while piece := sock.recv(65536):
            received += piece
    assert re.findall(rb"HTTP/1\.1 (\d+)", received) == [b"200"] * 5 + [b"400"]


def test_bytes_at_random_break_nothing(server: ServerProcess) -> None:
    rng = random.Random(5)
    good = post(json.dumps(GOOD | {"n": 2, "stop": ["a"], "logprobs": 2}).encode())
    for _ in range(150):
        mutated = bytearray(good)
        for _ in range(rng.randint(1, 12)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
            sock.sendall(mutated)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(65536)
        if answer:
            status = int(answer.split()[1])
            assert status == 200 or 400 <= status < 500, (status, bytes(mutated))


async def _vanish(port: int, number: int) -> None:
    """A client that goes away: while sending, while waiting, in the middle of its stream."""
    rng = random.Random(number)
    body = json.dumps({"prompt": f"Client {number}", "max_tokens": 400, "ignore_eos": True, "stream": number % 3 > 0})
    request = post(body.encode())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request[: rng.randrange(len(request))] if number % 5 == 0 else request)
        await writer.drain()
        async with asyncio.timeout(rng.expovariate(3)):
            await reader.read(2**20)
            await asyncio.sleep(10)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()


async def test_500_clients_that_vanish_leave_nothing_behind() -> None:
    async def crowd() -> int:
        await asyncio.gather(*[_vanish(server.port, number) for number in range(500)])
        deadline = time.monotonic() + 60
        while await asyncio.to_thread(what_is_held, server):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        return read_pss_bytes(server.process.pid)

    # The first crowd's prefixes fill so small a memory cache: memory that was never written to does not count yet.
    with ServerProcess("--local", "--threads", "1", "--memory", "24MiB", "--max-model-len", "512") as server:
        await crowd()
        before = await crowd()
        assert await crowd() < before + 12 * MIB


def test_what_the_document_describes_is_what_is_served(server: ServerProcess, tmp_path: Path) -> None:
    """Fields that depend on each other are beyond a schema: a valid request may still be refused with a 400."""
    command = [str(Path(sys.executable).with_name("st")), "run", server.url + "/openapi.json"]
    options = ["--phases", "coverage,fuzzing", "--max-examples", "12", "--generation-deterministic", "--no-color"]
    checks = ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"]
    run = subprocess.run(
        [*command, *options, *checks], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "10 passed" in run.stdout
