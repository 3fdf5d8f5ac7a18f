"""One server for all tests of the gateway, each of which writes its engine's script, and one with a real engine."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from model.tokenizer import Tokenizer
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.real_engine import real_server
from tests.gateway.server import MODEL_DIR, GatewayServer, served_model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.load(MODEL_DIR)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def shared_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def shared_server(shared_engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[GatewayServer]:
    with GatewayServer(shared_engine, served_model(tokenizer=tokenizer)) as server:
        yield server


@pytest.fixture
def engine(shared_engine: FakeEngine) -> FakeEngine:
    """The engine behind `server`, fresh."""
    shared_engine.reset()
    return shared_engine


@pytest.fixture
def server(shared_server: GatewayServer, engine: FakeEngine) -> GatewayServer:
    """A gateway for a model with a tokenizer, 4096 ids and room for 512 tokens."""
    return shared_server


@pytest.fixture
def client(server: GatewayServer) -> Iterator[httpx.Client]:
    """Speaks to `server`."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def real() -> Iterator[httpx.Client]:
    """Speaks to a server of the shipped model."""
    with real_server() as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
