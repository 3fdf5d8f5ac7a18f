"""What a streamed token costs the gateway, in microseconds of CPU time: `python -m tests.gateway.token_cost`.

The whole application, without engine and sockets: a stand-in posts one token a step to each stream, as an engine in
this process does, and what is sent is thrown away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import orjson
from starlette.types import Message, Scope

from model.tokenizer import Tokenizer
from service.engine.async_engine import AsyncEngine
from service.engine.local_client import LocalEngineClient
from service.engine.request import FinishReason, Request, RequestOutput
from service.gateway.app import create_app
from service.launcher import run_loop
from tests.gateway.fake_engine import INFO, TIMING
from tests.gateway.server import MODEL_DIR, served_model

NUM_STREAMS, NUM_TOKENS, NUM_ROUNDS = 32, 128, 8
BODY = orjson.dumps(
    {"prompt": list(range(300, 428)), "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True, "temperature": 0}
)
SCOPE = {
    **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
    **{"path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "", "query_string": b""},
    **{"client": None, "server": None, "headers": [(b"content-type", b"application/json")]},
}


class Posting(AsyncEngine):
    """An engine that says what it is told to."""

    def __init__(self) -> None:
        self.info = INFO
        self.listeners: dict[str, Callable[[RequestOutput], None]] = {}

    def submit(self, request: Request, listener: Callable[[RequestOutput], None]) -> None:
        self.listeners[request.request_id] = listener

    def post(self, token_id: int, *, is_first: bool, is_last: bool) -> None:
        """A step: one token to every stream."""
        reason, timing = FinishReason.LENGTH if is_last else None, TIMING if is_first or is_last else None
        for request_id, listener in self.listeners.items():
            listener(RequestOutput(request_id, (token_id,), reason, timing=timing))


class Streams:
    """Requests of clients that read at once."""

    def __init__(self) -> None:
        self.num_sent = 0

    async def receive_and_wait(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.num_sent += message["type"] == "http.response.body"


async def measure() -> float:
    """CPU seconds of the best round, for each token."""
    engine, best = Posting(), float("inf")
    app = create_app(LocalEngineClient(engine), served_model(INFO, Tokenizer.load(MODEL_DIR)))
    for _ in range(NUM_ROUNDS):
        streams, tasks = Streams(), []
        engine.listeners.clear()
        for _ in range(NUM_STREAMS):
            bodies = [{"type": "http.request", "body": BODY, "more_body": False}]

            async def receive(bodies: list[Message] = bodies, streams: Streams = streams) -> Message:
                return bodies.pop() if bodies else await streams.receive_and_wait()

            scope: Scope = {**SCOPE, "state": {}}
            tasks.append(asyncio.create_task(app(scope, receive, streams.send)))
        while len(engine.listeners) < NUM_STREAMS:
            await asyncio.sleep(0)
        started_s = time.process_time()
        for step in range(NUM_TOKENS):
            engine.post(300 + step, is_first=step == 0, is_last=step == NUM_TOKENS - 1)
            while streams.num_sent < (step + 1) * NUM_STREAMS:
                await asyncio.sleep(0)
        best = min(best, time.process_time() - started_s)
        await asyncio.gather(*tasks)
    return best / NUM_STREAMS / NUM_TOKENS


async def tell() -> None:
    print(f"a token: {1e6 * await measure():.1f} us")


if __name__ == "__main__":
    run_loop(tell())
