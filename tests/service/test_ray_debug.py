"""What an operator sees of several real replicas, through whichever of several gateways is asked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio

from service.config import EngineConfig
from service.gateway.api_keys import ApiKey, KeyRing
from service.ray_cluster import RayCluster
from tests.engine.scripted import make_request
from tests.service.engines import engine_of, load_paced
from tests.service.test_ray_faults import replica_pids

if TYPE_CHECKING:
    from service.ray_client import RayEngineClient

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

APP = "debug"
CONFIG = EngineConfig("scripted", max_num_seqs=2, max_num_waiting=8, max_num_batched_tokens=256, block_size=32)
KEYS = {"ann": "key-of-ann-0123456789", "ops": "key-of-ops-0123456789"}
PATHS = ("/debug/requests", "/debug/timeline", "/dashboard/data")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def clients(cluster: RayCluster) -> AsyncIterator[list[RayEngineClient]]:
    """Of two gateways, beside each other before the same two replicas."""
    from ray import serve

    from service.deployment import engine_application
    from service.ray_client import RayEngineClient

    load = partial(load_paced, step_s=0.01)
    await cluster.deploy(lambda: engine_application(CONFIG, num_replicas=2, num_cpus=0.1, load=load), APP)
    clients = [await RayEngineClient.connect(engine_of(APP)) for _ in range(2)]
    yield clients
    for client in clients:
        await client.close()
    await asyncio.to_thread(serve.delete, APP)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateways(clients: list[RayEngineClient]) -> AsyncIterator[list[httpx.AsyncClient]]:
    from service.gateway.app import create_app
    from tests.gateway.server import served_model

    keys = KeyRing(
        ApiKey(id=name, sha256=hashlib.sha256(key.encode()).hexdigest(), admin=name == "ops")
        for name, key in KEYS.items()
    )
    served = served_model(await clients[0].info())
    transports = [httpx.ASGITransport(create_app(client, served, keys=keys)) for client in clients]
    gateways = [httpx.AsyncClient(transport=transport, base_url="http://gateway") for transport in transports]
    yield gateways
    for gateway in gateways:
        await gateway.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def busy(clients: list[RayEngineClient]) -> AsyncIterator[None]:
    """Each gateway has three requests under way: two run on each replica, one waits there."""

    async def read(client: RayEngineClient, name: str) -> None:
        request = make_request(name, tuple(range(1, 40)), max_tokens=4000, ignore_eos=True)
        async with aclosing(client.generate(request)) as outputs:
            async for _ in outputs:
                pass

    readers = [asyncio.create_task(read(clients[n % 2], f"r{n}")) for n in range(6)]
    async with asyncio.timeout(120):
        while sum(stats.num_running for stats in await clients[0].stats()) < 4:
            await asyncio.sleep(0.05)
    yield
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)


async def get(gateway: httpx.AsyncClient, path: str, key: str = "ops") -> Any:
    answer = await gateway.get(path, headers={"Authorization": f"Bearer {KEYS[key]}"})
    return answer.json() if answer.status_code == 200 else answer.status_code


@pytest.mark.parametrize("path", PATHS)
async def test_only_an_admin_may_look(gateways: list[httpx.AsyncClient], path: str) -> None:
    for gateway in gateways:
        assert (await gateway.get(path)).status_code == 401
        assert await get(gateway, path, "ann") == 403


async def test_any_gateway_tells_of_all_requests_of_all_replicas(gateways: list[httpx.AsyncClient]) -> None:
    for gateway in gateways:
        replicas = (await get(gateway, "/debug/requests"))["replicas"]
        assert len({replica["replica"] for replica in replicas}) == 2
        states = [state for replica in replicas for state in replica["requests"]]
        assert {state["request_id"] for state in states} == {f"r{n}" for n in range(6)}
        for replica in replicas:
            assert [state["phase"] for state in replica["requests"]] == ["decode", "decode", "queue"]
        for state in states:
            spent_s = state["queued_s"] + state["prefill_s"] + state["decode_s"]
            assert spent_s == pytest.approx(state["age_s"])
            assert (state["num_blocks"] > 0) == (state["phase"] == "decode")


async def test_any_gateway_draws_the_memory_of_all_replicas(gateways: list[httpx.AsyncClient]) -> None:
    for gateway in gateways:
        rows = (await get(gateway, "/dashboard/data"))["replicas"]
        assert [len(row["tiles"]) for row in rows] == [1024, 1024]
        for row in rows:
            owners = set(row["tiles"]) - set(".-=")
            assert (row["running"], row["waiting"], len(owners)) == (2, 1, 2)


async def test_any_gateway_has_the_timeline_of_all_replicas(gateways: list[httpx.AsyncClient]) -> None:
    for gateway in gateways:
        events = (await get(gateway, "/debug/timeline?seconds=60"))["traceEvents"]
        names = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
        assert len(names) == 2
        for pid in names.values():
            steps = [event for event in events if event["pid"] == pid and event.get("cat") == "step"]
            assert steps[-1]["args"]["requests"] == 2


async def test_a_replica_that_hangs_hides_nobody_else(gateways: list[httpx.AsyncClient]) -> None:
    """The one that hangs is left out, and no counter goes back when it works again."""
    before = steps_told(await metrics(gateways[0]))
    assert len(before) == 2
    pid = replica_pids(APP)[0]
    os.kill(pid, signal.SIGSTOP)
    try:
        for gateway in gateways:
            replicas = (await get(gateway, "/debug/requests"))["replicas"]
            assert [len(replica["requests"]) for replica in replicas] == [3]
            [replica] = [replica["replica"] for replica in replicas]
            scrape = await metrics(gateway)
            told = steps_told(scrape)
            assert told.keys() == {replica}
            assert told[replica] > before[replica]
            assert "mosaic_num_engine_replicas 1.0" in scrape.splitlines()
    finally:
        os.kill(pid, signal.SIGCONT)
    for gateway in gateways:
        async with asyncio.timeout(120):
            while (told := steps_told(await metrics(gateway))).keys() != before.keys():
                await asyncio.sleep(0.05)
        assert all(told[replica] >= before[replica] for replica in before)


async def metrics(gateway: httpx.AsyncClient) -> str:
    return (await gateway.get("/metrics", headers={"Authorization": f"Bearer {KEYS['ops']}"})).text


def steps_told(scrape: str) -> dict[str, float]:
    """How many steps each replica has made."""
    lines = [line for line in scrape.splitlines() if line.startswith("mosaic_engine_steps_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}
