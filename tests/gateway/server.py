"""A gateway behind a real uvicorn, in a thread, so that synchronous and asynchronous clients can speak to it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI

from model.tokenizer import Tokenizer
from service.engine.stats import EngineInfo
from service.gateway.api_keys import KeyRing
from service.gateway.app import create_app
from service.gateway.client import EngineClient
from service.gateway.peers import Peers
from service.gateway.served_model import ServedModel
from service.gateway.settings import GatewaySettings
from service.settings import DEFAULT_MODEL
from tests.gateway.fake_engine import INFO

_T = TypeVar("_T")

MODEL_DIR = DEFAULT_MODEL


def served_model(info: EngineInfo = INFO, tokenizer: Tokenizer | None = None) -> ServedModel:
    """What tests serve: two names, created at a time that is easy to recognise."""
    return ServedModel(("mosaic", "tales"), tokenizer, info, created=1_700_000_000)


class GatewayServer:
    """Context manager: serves on a free port of 127.0.0.1 while inside."""

    def __init__(
        self,
        engine: EngineClient,
        served: ServedModel,
        settings: GatewaySettings | None = None,
        peers: Peers | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        self.app: FastAPI = create_app(engine, served, settings, peers, keys)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, loop="uvloop", http="httptools", access_log=False, log_config=None, timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def __enter__(self) -> GatewayServer:
        self._thread.start()
        wait_until(lambda: self._server.started, "the server to start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)
        self._socket.close()

    def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs `coroutine` on the server's loop and waits for its result."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Blocks until `condition` holds; AssertionError naming `what` where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.002)
