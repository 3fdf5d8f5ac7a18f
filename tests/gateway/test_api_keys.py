"""Keys: how they are read, found and asked for over HTTP, and that nobody ever sees one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from service.gateway.api_keys import ApiKey, KeyRing, keys_of_options, read_key_file
from service.gateway.settings import GatewaySettings
from tests.gateway.fake_engine import FakeEngine, say
from tests.gateway.server import GatewayServer, served_model

ADMIN, ALICE, BOB = "sk-admin-0123456789", "sk-alice-0123456789", "sk-bob-0123456789"

FILE = f"""
keys:
  - id: alice
    key: {ALICE}
    weight: 3
    min_priority: -5
    requests_per_minute: 60
    tokens_per_minute: 1000
  - id: bob
    sha256: {hashlib.sha256(BOB.encode()).hexdigest()}
"""


def write(directory: Path, text: str, name: str = "keys.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_yaml_file_says_what_each_key_may_do(tmp_path: Path) -> None:
    alice, bob = read_key_file(write(tmp_path, FILE))
    assert (alice.id, alice.weight, alice.min_priority, alice.requests_per_minute) == ("alice", 3, -5, 60)
    assert alice.sha256 == hashlib.sha256(ALICE.encode()).hexdigest()
    assert (bob.weight, bob.min_priority, bob.requests_per_minute, bob.admin) == (1, 0, None, False)
    ring = KeyRing([alice, bob])
    assert ring.find(ALICE.encode()) == alice
    assert ring.find(BOB.encode()) == bob
    assert ring.find(bob.sha256.encode()) is None


def test_a_file_of_lines_has_one_key_in_each(tmp_path: Path) -> None:
    keys = read_key_file(write(tmp_path, f"# team\n{ALICE}\n\n  {BOB}\n", "keys.txt"))
    assert [key.id for key in keys] == [f"key-{hashlib.sha256(k.encode()).hexdigest()[:8]}" for k in (ALICE, BOB)]
    assert not any(key.admin for key in keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [", "not YAML at line 1"),
        ("keys: 5", "must hold a mapping with 'keys'"),
        ("keys: []\nmore: 1", "must hold a mapping with 'keys'"),
        (f"keys: [{{id: a, key: {ALICE}, colour: red}}]", r"keys\.0\.colour: "),
        (f"keys: [{{id: a, key: {ALICE}, weight: 0}}]", r"keys\.0\.weight: .*greater than or equal to 1"),
        (f"keys: [{{id: 'a b', key: {ALICE}}}]", r"keys\.0\.id: "),
        ("keys: [{id: a}]", r"keys\.0\.sha256: Field required"),
        ("keys: [{id: a, key: ''}]", "1 to 512 characters"),
        ("keys: [{id: a, key: 'two words-secret'}]", "printable ASCII"),
        ("keys: [{id: a, key: 12345678}]", "must be a text"),
        (f"keys: [{{id: a, key: {ALICE}, sha256: {'0' * 64}}}]", "not both"),
        (f"keys: [{{id: a, key: {ALICE}, min_priority: 2, max_priority: 1}}]", "min_priority must be at most"),
        (f"keys: [{ALICE}]", r"keys\.0: "),
    ],
)
def test_a_bad_file_is_explained_without_its_secrets(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_key_file(write(tmp_path, text))
    assert "secret" not in str(caught.value)
    assert ALICE not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([], "there is no API key"),
        (keys_of_options([ALICE, ALICE]), "two API keys are the same"),
        ([ApiKey(id="a", sha256="0" * 64), ApiKey(id="a", sha256="1" * 64)], "two API keys have the id 'a'"),
    ],
)
def test_keys_that_contradict_each_other_change_nothing(keys: list[ApiKey], words: str) -> None:
    ring = KeyRing(keys_of_options([BOB]))
    with pytest.raises(ValueError, match=words):
        ring.replace(keys)
    assert ring.find(BOB.encode()) is not None


TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)


@given(secrets=st.sets(TEXT, min_size=1), data=st.data())
def test_exactly_the_keys_are_found(secrets: set[str], data: st.DataObject) -> None:
    ring = KeyRing(keys_of_options(sorted(secrets)))
    assert all(ring.find(secret.encode()) for secret in secrets)
    other = data.draw(TEXT.filter(lambda text: text not in secrets))
    assert ring.find(other.encode()) is None


def test_a_key_does_not_show_itself() -> None:
    [key] = keys_of_options([ALICE])
    assert ALICE not in repr(key)
    assert key.sha256 not in repr(key)


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def guarded(
    engine: FakeEngine, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    keys = read_key_file(write(tmp_path_factory.mktemp("keys"), FILE)) + keys_of_options([ADMIN])
    engine.reset(say([5, 6, 7]))
    settings = GatewaySettings(cors_origins=("https://page.example",))
    with GatewayServer(engine, served_model(tokenizer=tokenizer), settings, keys=KeyRing(keys)) as server:
        yield server


@pytest.fixture(scope="module")
def guarded_client(guarded: GatewayServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_document_says_what_needs_a_key(guarded: GatewayServer, guarded_client: httpx.Client) -> None:
    """And every route that is not said to be open asks for one."""
    document = guarded_client.get("/openapi.json", headers=bearer(ALICE)).json()
    assert document["components"]["securitySchemes"]["ApiKey"] == {"type": "http", "scheme": "bearer"}
    assert document["security"] == [{"ApiKey": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            is_open = operation.get("security") == []
            assert is_open == (path in ("/health", "/livez", "/readyz"))
            assert is_open or "401" in operation["responses"], (method, path)
            assert is_open == (guarded_client.request(method, path).status_code != 401)


def test_the_official_client_is_let_in_with_its_key(guarded: GatewayServer) -> None:
    with openai.OpenAI(base_url=guarded.url + "/v1", api_key=ALICE, max_retries=0) as client:
        assert client.completions.create(model="mosaic", prompt="x").choices[0].finish_reason == "length"
        assert client.models.list().data[0].id == "mosaic"
    with (
        openai.OpenAI(base_url=guarded.url + "/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not known here"),
    ):
        client.completions.create(model="mosaic", prompt="x")


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/models", "/tokenize", "/version", "/openapi.json", "/metrics", "/nowhere", "/livez/"],
)
def test_without_a_key_nothing_but_the_probes_answers(guarded_client: httpx.Client, path: str) -> None:
    wrong = ("", "Bearer", "Bearer nobody", f"Basic {ALICE}", ALICE, f"Bearer {ALICE} {ALICE}", "Bearer \xff")
    headers = [[], *([("Authorization", text.encode("latin-1"))] for text in wrong)]
    headers.append([("Authorization", f"Bearer {ALICE}".encode()), ("Authorization", b"Bearer nobody")])
    for number, each in enumerate(headers):
        answer = guarded_client.request(("GET", "POST", "DELETE")[number % 3], path, headers=each)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer ")
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/", "/dashboard", "/static/playground.js"])
def test_probes_and_the_pages_need_no_key(guarded_client: httpx.Client, path: str) -> None:
    assert guarded_client.get(path).status_code == 200
    assert guarded_client.get(path, headers=bearer("wrong")).status_code == 200


@pytest.mark.parametrize("path", ["/dashboard/data", "/debug/requests", "/debug/timeline"])
def test_looking_into_the_server_is_for_admins(guarded_client: httpx.Client, path: str) -> None:
    assert guarded_client.get(path).status_code == 401
    assert guarded_client.get(path, headers=bearer(ALICE)).status_code == 403
    assert guarded_client.get(path, headers=bearer(ADMIN)).status_code == 200


def test_metrics_are_for_admins(guarded_client: httpx.Client, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    assert guarded_client.get("/metrics", headers=bearer(ADMIN)).status_code == 200
    refused = guarded_client.get("/metrics", headers=bearer(ALICE))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_admin")
    settings = GatewaySettings(has_public_metrics=True)
    keys = KeyRing(keys_of_options([ADMIN]))
    with GatewayServer(engine, served_model(tokenizer=tokenizer), settings, keys=keys) as server:
        assert httpx.get(server.url + "/metrics").status_code == 200
        assert httpx.get(server.url + "/version").status_code == 401


def test_a_browser_may_ask_beforehand_without_a_key(guarded_client: httpx.Client) -> None:
    asks = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    assert guarded_client.options("/v1/completions", headers=asks).status_code == 200
    refused = guarded_client.get("/v1/models", headers={"Origin": "https://page.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_the_log_names_the_key_and_never_shows_it(
    guarded_client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        guarded_client.get("/v1/models", headers=bearer(ALICE))
        guarded_client.get("/v1/models", headers=bearer("sk-nobody"))
    fields = [record.fields for record in caplog.records if record.name == "tessera.access"]  # type: ignore[attr-defined]
    assert [line.get("key") for line in fields] == ["alice", None]
    assert ALICE not in caplog.text
    assert "sk-nobody" not in caplog.text


def test_the_engine_hears_of_ids_and_weights_alone(guarded_client: httpx.Client, engine: FakeEngine) -> None:
    body = {"prompt": "x", "priority": -5}
    assert guarded_client.post("/v1/completions", json=body, headers=bearer(ALICE)).status_code == 200
    request = engine.requests[-1]
    assert (request.key_id, request.weight, request.priority) == ("alice", 3, -5)
    assert ALICE not in repr(request)


@pytest.mark.parametrize(("key", "least"), [(ALICE, -5), (BOB, 0)])
def test_a_priority_beyond_the_keys_bounds_is_refused(guarded_client: httpx.Client, key: str, least: int) -> None:
    body = {"prompt": "x", "priority": least - 1}
    answer = guarded_client.post("/v1/completions", json=body, headers=bearer(key))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "priority"
    assert f"at least {least} with this API key" in answer.json()["error"]["message"]
