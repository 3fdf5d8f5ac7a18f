"""The shipped model behind a gateway, with the CPU kernels where they are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from model.tokenizer import Tokenizer
from service.config import EngineConfig
from service.engine.loader import load_engine
from service.engine.local_client import LocalEngineClient
from tests.gateway.server import MODEL_DIR, GatewayServer, served_model


@contextmanager
def real_server() -> Iterator[GatewayServer]:
    """A server of the shipped model, 512 tokens at most, 16 sequences at a time, one thread."""
    engine = load_engine(EngineConfig(str(MODEL_DIR), num_threads=1, max_num_seqs=16, max_num_batched_tokens=64))

    async def start() -> None:
        engine.start()

    with GatewayServer(LocalEngineClient(engine), served_model(engine.info, Tokenizer.load(MODEL_DIR))) as server:
        server.call(start())
        yield server
        server.call(engine.close())
