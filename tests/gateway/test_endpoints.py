"""The small endpoints: models, tokens, probes, version, the document that describes them all."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.engine.stats import EngineHealth, Fleet
from service.gateway.settings import GatewaySettings
from service.version import package_version
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.server import GatewayServer, served_model

CARD = {"id": "mosaic", "object": "model", "created": 1_700_000_000, "owned_by": "tessera", "max_model_len": 512}


def test_models_are_listed_under_all_their_names(client: httpx.Client) -> None:
    assert client.get("/v1/models").json() == {"object": "list", "data": [CARD, {**CARD, "id": "tales"}]}
    assert client.get("/v1/models/mosaic").json() == CARD


def test_a_name_with_a_slash_is_found(tokenizer: Tokenizer) -> None:
    served = served_model(tokenizer=tokenizer)
    served = type(served)(("org/name",), served.tokenizer, served.info, served.created)
    with GatewayServer(FakeEngine(), served) as server:
        assert httpx.get(server.url + "/v1/models/org/name").json()["id"] == "org/name"
        assert httpx.get(server.url + "/v1/models/org%2Fname").json()["id"] == "org/name"


@pytest.mark.parametrize("text", ["Once upon a time", "", "🦊 é\n", "<|endoftext|>"])
def test_text_goes_to_tokens_and_back(client: httpx.Client, tokenizer: Tokenizer, text: str) -> None:
    answer = client.post("/tokenize", json={"prompt": text, "model": "tales", "add_special_tokens": True}).json()
    ids = tokenizer.encode(text)
    assert answer == {"count": len(ids), "max_model_len": 512, "tokens": ids}
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_special_tokens_are_spelled_out(client: httpx.Client) -> None:
    assert client.post("/detokenize", json={"tokens": [0]}).json() == {"prompt": "<|endoftext|>"}


def test_ids_outside_the_vocabulary_are_refused(client: httpx.Client) -> None:
    answer = client.post("/detokenize", json={"tokens": [1, 4096]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tokens[1]"
    assert "'tokens[1]'" in answer.json()["error"]["message"]


def test_health_is_the_engines(client: httpx.Client, engine: FakeEngine) -> None:
    assert client.get("/health").json() == {"status": "ok", "seconds_since_progress": 0.5}
    assert client.get("/readyz").json() == {"status": "ok"}
    engine.health_report = EngineHealth(False, "no step for 61 s", 61.0)
    for path in ("/health", "/readyz"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unhealthy"
        assert "no step for 61 s" in answer.json()["error"]["message"]
    assert client.get("/livez").json() == {"status": "ok"}


def test_health_of_an_engine_that_cannot_be_reached_is_red(client: httpx.Client, engine: FakeEngine) -> None:
    engine.health_report = ConnectionError("10.0.0.7 refused")
    answer = client.get("/health")
    assert answer.status_code == 503
    assert "10.0.0.7" not in answer.text


def test_health_of_an_engine_that_does_not_answer_is_red_in_time(tokenizer: Tokenizer) -> None:
    engine = FakeEngine()
    engine.health_report = None
    settings = GatewaySettings(health_timeout_s=0.05)
    with GatewayServer(engine, served_model(tokenizer=tokenizer), settings) as server:
        answer = httpx.get(server.url + "/health", timeout=60)
    assert answer.status_code == 503
    assert "within 0.05 s" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz", "/health"])
def test_probes_may_ask_for_heads_only(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_version(client: httpx.Client) -> None:
    assert client.get("/version").json() == {"version": package_version()}


def test_the_document_describes_bodies_and_errors(client: httpx.Client) -> None:
    document: dict[str, Any] = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["prompt"]
    assert body["properties"]["temperature"]["type"] == ["number", "null"]
    assert {"minimum", "maximum", "default", "description"} <= body["properties"]["temperature"].keys()
    assert "$ref" not in str(body)
    assert set(operation["responses"]) == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503"}
    error = operation["responses"]["503"]["content"]["application/json"]["schema"]
    assert error == {"$ref": "#/components/schemas/ErrorResponse"}
    for path in ("/", "/static/{name}"):
        assert path not in document["paths"]


def test_a_server_that_sleeps_is_ready_and_says_so(client: httpx.Client, engine: FakeEngine) -> None:
    engine.health_report = EngineHealth(True, "no engine replica runs; a request starts one", is_asleep=True)
    engine.snapshots, engine.fleet_report = [], Fleet(0, 0)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "asleep"})
    assert client.get("/health").status_code == 200
    lines = client.get("/metrics").text.splitlines()
    assert "mosaic_num_engine_replicas_wanted 0.0" in lines
    engine.fleet_report = None
    assert not any(
        line.startswith("mosaic_num_engine_replicas_wanted") for line in client.get("/metrics").text.splitlines()
    )
