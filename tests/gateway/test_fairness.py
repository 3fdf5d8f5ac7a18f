"""Two keys at a real engine, one of which floods it: counted by completions, not by the clock."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest

from service.config import EngineConfig
from service.engine.async_engine import AsyncEngine
from service.engine.loader import load_engine
from service.engine.local_client import LocalEngineClient
from service.engine.request import Request, RequestOutput
from service.gateway.api_keys import ApiKey, KeyRing, digest
from tests.gateway.server import MODEL_DIR, GatewayServer, served_model

FLOOD, CALM = "sk-flood-0123456789", "sk-calm-0123456789"
NUM_SEQS, NUM_WAITING = 2, 24
BODY = {"prompt": [5, 6, 7], "max_tokens": 24, "ignore_eos": True, "temperature": 0}


class Recorded(LocalEngineClient):
    """Notes in which order requests come to the engine and end there."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self.engine = engine
        self.events: list[tuple[str, str, str]] = []

    async def deliver(self, request: Request, listener: Callable[[RequestOutput], None]) -> None:
        def hear(output: RequestOutput) -> None:
            if output.is_finished:
                self.events.append(("ended", request.key_id, request.request_id))
            listener(output)

        self.events.append(("came", request.key_id, request.request_id))
        await super().deliver(request, hear)

    def overtaken(self, key_id: str) -> list[int]:
        """For each request of a key, how many of other keys ended while it was there."""
        counts = []
        for what, key, request_id in self.events:
            if what == "came" and key == key_id:
                since = self.events[self.events.index((what, key, request_id)) :]
                during = since[: since.index(("ended", key, request_id))]
                counts.append(sum(event == "ended" and other != key for event, other, _ in during))
        return counts


@pytest.fixture(scope="module")
def engine_client() -> Recorded:
    limits = {"max_num_seqs": NUM_SEQS, "max_num_waiting": NUM_WAITING, "max_num_batched_tokens": 32}
    return Recorded(load_engine(EngineConfig(str(MODEL_DIR), num_threads=1, **limits)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server(engine_client: Recorded) -> Iterator[GatewayServer]:
    engine = engine_client.engine
    keys = KeyRing(ApiKey(id=key[3:-11], sha256=digest(key).hex()) for key in (FLOOD, CALM))

    async def start() -> None:
        engine.start()

    with GatewayServer(engine_client, served_model(engine.info), keys=keys) as server:
        server.call(start())
        yield server
        server.call(engine.close())


class Flood:
    """Keeps so many requests of one key at the server, and counts what becomes of them."""

    def __init__(self, client: httpx.AsyncClient, num_at_once: int) -> None:
        self.answers: Counter[tuple[int, str]] = Counter()
        self._client = client
        self._is_over = False
        self._tasks = [asyncio.create_task(self._send()) for _ in range(num_at_once)]

    @property
    def num_completed(self) -> int:
        return self.answers[200, ""]

    async def until(self, num_completed: int) -> None:
        async with asyncio.timeout(60):
            while self.num_completed < num_completed:
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _send(self) -> None:
        while not self._is_over:
            answer = await ask(self._client, FLOOD)
            code = "" if answer.status_code == 200 else answer.json()["error"]["code"]
            self.answers[answer.status_code, code] += 1
            if code:
                assert int(answer.headers["retry-after"]) >= 1
                await asyncio.sleep(0.05)


async def ask(client: httpx.AsyncClient, key: str) -> httpx.Response:
    return await client.post("/v1/completions", json=BODY, headers={"Authorization": f"Bearer {key}"})


async def test_a_key_that_floods_does_not_make_another_wait(server: GatewayServer, engine_client: Recorded) -> None:
    """First come, first served would let the flood's whole queue go first, each time."""
    num_at_once = NUM_SEQS + NUM_WAITING // 2
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        flood = Flood(client, num_at_once)
        await flood.until(3)
        for _ in range(5):
            assert (await ask(client, CALM)).status_code == 200
        await flood.stop()
    overtaken = engine_client.overtaken("calm")
    assert len(overtaken) == 5
    # What runs must end, a turn may be the flood's, and one slot goes on while the other is ours.
    assert max(overtaken) <= 2 * NUM_SEQS + 1, overtaken
    assert num_at_once - NUM_SEQS > 2 * (2 * NUM_SEQS + 1), "else nothing would be proved"


async def test_a_key_that_floods_leaves_room_in_the_queue(server: GatewayServer) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        flood = Flood(client, 2 * (NUM_SEQS + NUM_WAITING))
        await flood.until(4)
        answers = await asyncio.gather(*(ask(client, CALM) for _ in range(4)))
        await flood.stop()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert flood.answers[429, "queue_share_exceeded"] > 0
    assert not [answer for answer in flood.answers if answer[0] not in (200, 429)]
