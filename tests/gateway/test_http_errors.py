"""Errors of HTTP itself: each has its status, all have one shape."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.gateway.settings import GatewaySettings
from tests.gateway.fake_engine import FakeEngine, steps
from tests.gateway.server import GatewayServer, served_model

JSON = {"Content-Type": "application/json"}


def assert_error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert answer.headers["x-request-id"]
    return error


@pytest.fixture
def small(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    """Speaks to a server that takes bodies of 1000 bytes within a fifth of a second."""
    settings = GatewaySettings(max_body_bytes=1000, body_timeout_s=0.2)
    with (
        GatewayServer(FakeEngine(), served_model(tokenizer=tokenizer), settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("path", ["/nope", "/v1/completions/", "/static/nope.js", "/static/..%2fapp.py", "/docs"])
def test_unknown_paths_are_404(client: httpx.Client, path: str) -> None:
    assert_error(client.get(path), 404, "not_found")


def test_unknown_models_are_404(client: httpx.Client) -> None:
    assert assert_error(client.get("/v1/models/nope"), 404, "model_not_found")["param"] == "model"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "/v1/completions", "POST"), ("DELETE", "/v1/models", "GET"), ("POST", "/metrics", "GET")],
)
def test_wrong_methods_are_405_and_told_the_right_one(client: httpx.Client, method: str, path: str, allow: str) -> None:
    answer = client.request(method, path)
    assert_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "json"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {},
    ],
)
def test_bodies_that_are_not_json_are_415(client: httpx.Client, headers: dict[str, str]) -> None:
    request = client.build_request("POST", "/v1/completions", content=b'{"prompt": [1]}', headers=headers)
    if not headers:
        request.headers.pop("content-type", None)
    assert_error(client.send(request), 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", "application/json; charset=UTF-8"])
def test_spellings_of_json_are_accepted(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/completions", content=b'{"prompt": [1]}', headers={"Content-Type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1"),
        (b'{"prompt":\n [1],}', "line 2, column"),
        (b'{"prompt": NaN}', "line 1, column 12"),
        (b'{"prompt": "\xff"}', "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"a":' * 5000, "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"temperature": 1e999, "prompt": [1]}', "line 1, column"),
    ],
)
def test_bodies_that_cannot_be_read_say_where(client: httpx.Client, body: bytes, words: str) -> None:
    error = assert_error(client.post("/v1/completions", content=body, headers=JSON), 400, "invalid_json")
    assert words in error["message"]
    assert error["param"] is None


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"prompt": [1], "seed": 1, "seed": 1}', "seed"),
        (b'{"prompt": [1], "seed": 1, "s\\u0065ed": 2, "user": "a:b"}', "seed"),
        (
            b'{"prompt": [1], "stream": true, "stream_options": {"include_usage": true, "include_usage": null}}',
            "stream_options.include_usage",
        ),
        (
            b'{"prompt": [1], "response_format": [[1], [{"a": 1}, {"b": [{"c": 1, "c": 2}]}]]}',
            "response_format[1][1].b[0].c",
        ),
        (b'{"prompt": [1], "seed": %s, "seed": 2}' % (b"1" * 300), "seed"),
        (b'{"prompt": [1], "%s": 1, "%s": 2}' % (b"x" * 5000, b"x" * 5000), "x" * 63 + "…"),
    ],
)
def test_a_key_that_is_there_twice_is_named(client: httpx.Client, body: bytes, key: str) -> None:
    error = assert_error(client.post("/v1/completions", content=body, headers=JSON), 400, "repeated_parameter")
    assert error["param"] == key
    assert error["message"] == f"'{key}' is there more than once"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a: b, \\"seed\\": 1, \\"seed\\": 2", "seed": 3}',
        b'{"prompt": [1], "logit_bias": {"1": 1, "11": 1}, "stream": true, "stream_options": {"include_usage": true}}',
    ],
)
def test_keys_that_only_look_repeated_are_none(client: httpx.Client, body: bytes) -> None:
    assert client.post("/v1/completions", content=body, headers=JSON).status_code == 200


def test_a_body_too_deep_to_look_through_is_refused(client: httpx.Client) -> None:
    body = b'{"prompt": [1], "user": ' + b'{"a":' * 1000 + b"1" + b"}" * 1001
    assert_error(client.post("/v1/completions", content=body, headers=JSON), 400, "invalid_json")


def test_large_bodies_are_413_announced_or_not(small: httpx.Client) -> None:
    body = b'{"prompt": "%s"}' % (b"x" * 1000)
    assert_error(small.post("/v1/completions", content=body, headers=JSON), 413, "request_too_large")
    # Without a Content-Length, the body comes in chunks of unknown number.
    chunked = (body[i : i + 100] for i in range(0, len(body), 100))
    error = assert_error(small.post("/v1/completions", content=chunked, headers=JSON), 413, "request_too_large")
    assert "1000 bytes" in error["message"]


def test_a_body_that_does_not_come_is_408(small: httpx.Client) -> None:
    address = (small.base_url.host, small.base_url.port or 0)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


def test_an_unforeseen_failure_is_a_500_that_says_nothing(
    client: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = steps(ZeroDivisionError("secret"))
    answer = client.post("/v1/completions", json={"prompt": [1]})
    assert "secret" not in assert_error(answer, 500, "internal_error")["message"]
    assert answer.headers["x-request-id"] in caplog.text, "the log has what the client is not told"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("given", ["a" * 129, "has space", 'quote"', ""])
def test_request_ids_that_are_not_sane_are_replaced(client: httpx.Client, given: str) -> None:
    answer = client.post("/v1/completions", json={"prompt": [1]}, headers={"X-Request-Id": given})
    new = answer.headers["x-request-id"]
    assert new != given
    assert new.startswith("cmpl-")
    assert answer.json()["id"] == new


def test_other_sites_may_not_call_unless_they_are_named(client: httpx.Client, tokenizer: Tokenizer) -> None:
    origin = {"Origin": "https://friend.example"}
    ask = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert client.options("/v1/completions", headers=ask).status_code == 405
    assert "access-control-allow-origin" not in client.get("/version", headers=origin).headers
    settings = GatewaySettings(cors_origins=("https://friend.example",))
    with (
        GatewayServer(FakeEngine(), served_model(tokenizer=tokenizer), settings) as server,
        httpx.Client(base_url=server.url) as named,
    ):
        answer = named.options("/v1/completions", headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        answer = named.post("/v1/completions", json={"prompt": [1]}, headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        refused = named.options("/v1/completions", headers={**ask, "Origin": "https://foe.example"})
        assert refused.json()["error"]["code"] == "cors_refused"
        assert all("x-request-id" in told.headers for told in (answer, refused))
