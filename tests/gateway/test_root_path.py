"""Behind a proxy that shows the server under a path of its own, whether it strips that path or not."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path

from model.tokenizer import Tokenizer
from service.gateway.api_keys import KeyRing, keys_of_options
from service.gateway.auth import _route_path
from service.gateway.settings import GatewaySettings
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.server import GatewayServer, served_model

SECRET = "sk-0123456789"


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    settings = GatewaySettings(root_path="/ai/tessera")
    keys = KeyRing(keys_of_options([SECRET]))
    with (
        GatewayServer(FakeEngine(), served_model(tokenizer=tokenizer), settings, keys=keys) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("prefix", ["", "/ai/tessera"])
def test_every_route_answers_with_and_without_the_path(client: httpx.Client, prefix: str) -> None:
    key = {"Authorization": f"Bearer {SECRET}"}
    assert client.post(f"{prefix}/v1/completions", json={"prompt": "x"}, headers=key).status_code == 200
    assert client.get(f"{prefix}/v1/models/mosaic", headers=key).status_code == 200
    assert client.get(f"{prefix}/livez").status_code == 200
    missing = client.get(f"{prefix}/nowhere", headers=key)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/v1/models", "/ai/tessera/v1/models", "/ai/tessera/metrics", "/ai/tessera//", "/ai"])
def test_the_path_is_no_way_around_the_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 401


_PARTS = st.lists(st.sampled_from(["/", "a", "a/", "/a", "b", "//", "%2f"]), max_size=4).map("".join)


@given(root=st.sampled_from(["", "/a", "/a/b"]), path=_PARTS)
def test_the_layer_of_keys_sees_the_path_that_routing_sees(root: str, path: str) -> None:
    """If this name goes, see what routing goes by instead."""
    scope = {"type": "http", "path": path, "root_path": root}
    assert _route_path(scope) == get_route_path(scope)


@pytest.mark.parametrize("page", ["/", "/ai/tessera", "/ai/tessera/"])
def test_the_page_finds_its_files(client: httpx.Client, page: str) -> None:
    answer = client.get(page)
    assert answer.status_code == 200
    links = re.findall(r'(?:href|src)="([^"]+)"', answer.text)
    assert len(links) == 4
    for link in links:
        assert link.startswith("/ai/tessera/static/")
        assert client.get(link).status_code == 200


def test_the_document_says_where_the_server_is(client: httpx.Client) -> None:
    document = client.get("/openapi.json", headers={"Authorization": f"Bearer {SECRET}"}).json()
    assert document["servers"] == [{"url": "/ai/tessera"}]
