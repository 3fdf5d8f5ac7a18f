"""Real Ray replicas whose number follows the work: more under load, fewer at rest, none where nothing is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from service.autoscaling import Scaling
from service.config import EngineConfig
from service.ray_cluster import RayCluster
from tests.engine.scripted import continuation, make_request
from tests.service.engines import engine_of, load_paced
from tests.service.test_ray_client import collect

if TYPE_CHECKING:
    from service.ray_client import RayEngineClient

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

APP = "scaled"
CONFIG = EngineConfig("scripted", max_num_seqs=8, max_num_waiting=64, max_num_batched_tokens=256)
SCALING = Scaling(
    min_replicas=0,
    max_replicas=2,
    initial_replicas=1,
    target_backlog_s=1.0,
    upscale_delay_s=0.2,
    downscale_delay_s=3.0,  # with less it may go before anything was asked for
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: RayCluster) -> AsyncIterator[RayEngineClient]:
    from ray import serve

    from service.deployment import engine_application
    from service.ray_client import RayEngineClient

    load = partial(load_paced, step_s=0.01)
    await cluster.deploy(lambda: engine_application(CONFIG, scaling=SCALING, num_cpus=0.1, load=load), APP)
    client = await RayEngineClient.connect(engine_of(APP))
    yield client
    await client.close()
    await asyncio.to_thread(serve.delete, APP)


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


def num_wanted(client: RayEngineClient) -> int:
    fleet = client.fleet()
    assert fleet is not None
    return fleet.num_wanted


async def test_replicas_come_with_the_work_and_go_with_it_and_nothing_is_lost(client: RayEngineClient) -> None:
    assert num_wanted(client) == 1
    requests = [make_request(f"load-{n}", (n % 40 + 1, 3), 300, ignore_eos=True) for n in range(24)]
    readers = [asyncio.create_task(collect(client, request, timeout_s=120)) for request in requests]
    await until(lambda: num_wanted(client) == 2)
    # What comes now finds the new one, which has less to do.
    await until(lambda: len(client._links) == 2)
    late = [make_request(f"late-{n}", (n + 1, 5), 20, ignore_eos=True) for n in range(4)]
    assert await asyncio.gather(*(collect(client, r) for r in late)) == [continuation(r) for r in late]
    work = [stats.num_generated_tokens for stats in await client.stats()]
    assert len(work) == 2
    assert min(work) > 0
    assert await asyncio.gather(*readers) == [continuation(request) for request in requests]
    await until(lambda: num_wanted(client) == 1)
    await until(lambda: num_wanted(client) == 0)


async def test_what_comes_while_none_is_there_waits_for_one(client: RayEngineClient) -> None:
    await until(lambda: not client._links)
    health = await client.health()
    assert (health.is_healthy, health.is_asleep) == (True, True)
    assert list(await client.stats()) == list(await client.inspect()) == []
    requests = [make_request(f"wake-{n}", (n + 1,), 20, ignore_eos=True) for n in range(12)]
    answers = await asyncio.gather(*(collect(client, request) for request in requests))
    assert answers == [continuation(request) for request in requests]
    assert not (await client.health()).is_asleep
