"""Names by which a server may be called, through real requests."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.gateway.host_guard import host_name
from service.gateway.settings import GatewaySettings
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.server import GatewayServer, served_model


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    settings = GatewaySettings(
        allowed_hosts=("tales.example", "*.mosaic.example"), cors_origins=("https://pages.example",)
    )
    with (
        GatewayServer(FakeEngine(), served_model(tokenizer=tokenizer), settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost:8000", "LOCALHOST", "a.localhost", "[::1]:8000", "[::1]", "10.1.2.3:80"),
        *("tales.example", "Tales.Example.:443", "a.mosaic.example", "b.a.mosaic.example:1"),
    ],
)
def test_a_known_name_or_an_address_is_served(client: httpx.Client, host: str) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x"}, headers={"host": host})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "host",
    [
        *("attacker.example", "attacker.example:8000", "tales.example.attacker.example", "mosaic.example"),
        *("amosaic.example", "127.0.0.1.attacker.example", "localhost.attacker.example", "notlocalhost"),
        *("[attacker.example]", "a@127.0.0.1", "", ":80"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nowhere")])
def test_another_name_is_refused_whatever_is_asked_for(client: httpx.Client, host: str, method: str, path: str) -> None:
    answer = client.request(method, path, headers={"host": host, "origin": "https://pages.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert answer.json()["error"]["type"] == "permission_error"
    assert answer.headers["x-request-id"]
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("hosts", "status"), [(("localhost", "attacker.example"), 403), (("localhost", "tales.example"), 200), ((), 200)]
)
def test_all_names_in_a_request_count(client: httpx.Client, hosts: tuple[str, ...], status: int) -> None:
    connection = HTTPConnection(client.base_url.host, client.base_url.port or 0, timeout=60)
    connection.putrequest("GET", "/livez", skip_host=True)
    for host in hosts:
        connection.putheader("host", host)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


@pytest.mark.parametrize("names", [(), ("*",), ("a.example", "*")])
def test_all_names_are_good_where_nothing_or_a_star_is_given(tokenizer: Tokenizer, names: tuple[str, ...]) -> None:
    settings = GatewaySettings(allowed_hosts=names)
    with GatewayServer(FakeEngine(), served_model(tokenizer=tokenizer), settings) as server:
        assert httpx.get(f"{server.url}/livez", headers={"host": "any.example"}).status_code == 200


def test_a_name_is_what_comes_before_the_port() -> None:
    given = ("A.example:80", "[::1]:80", "::1", "a.example.", "")
    assert [host_name(host) for host in given] == ["a.example", "::1", "", "a.example", ""]
