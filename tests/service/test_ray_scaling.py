"""Real Ray replicas whose number follows the work: more under load, fewer at rest, none where nothing is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from service.autoscaling import Scaling
from service.config import EngineConfig
from service.engine.errors import EngineDeadError
from service.engine.request import FinishReason
from service.engine.stats import Fleet
from service.ray_cluster import RayCluster
from tests.engine.scripted import continuation, make_request
from tests.service.engines import engine_of, load_other, load_paced, load_with_tokenizer
from tests.service.test_ray_client import collect

if TYPE_CHECKING:
    from service.ray_client import RayEngineClient
    from service.ray_engine import LoadEngine

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


async def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


def num_wanted(client: RayEngineClient) -> int:
    fleet = client.fleet()
    assert fleet is not None
    return fleet.num_wanted


async def test_replicas_come_with_the_work_and_go_with_it_and_nothing_is_lost(client: RayEngineClient) -> None:
    assert num_wanted(client) == 1

    async def ask_until_there_are_more(n: int) -> None:
        turn = 0
        while turn == 0 or num_wanted(client) < 2:
            request = make_request(f"load-{n}-{turn}", (n % 40 + 1, 3), 300, ignore_eos=True)
            assert await collect(client, request, timeout_s=300) == continuation(request)
            turn += 1

    readers = [asyncio.create_task(ask_until_there_are_more(n)) for n in range(24)]
    await until(lambda: num_wanted(client) == 2)
    # What comes now finds the new one, which has less to do.
    await until(lambda: len(client._links.by_replica) == 2)
    late = [make_request(f"late-{n}", (n + 1, 5), 20, ignore_eos=True) for n in range(4)]
    assert await asyncio.gather(*(collect(client, r) for r in late)) == [continuation(r) for r in late]
    work = [stats.num_generated_tokens for stats in await client.stats()]
    assert len(work) == 2
    assert min(work) > 0
    await asyncio.gather(*readers)
    await until(lambda: num_wanted(client) == 1)
    await until(lambda: num_wanted(client) == 0)


async def test_what_comes_while_none_is_there_waits_for_one(client: RayEngineClient) -> None:
    from service.ray_link import Timeouts

    await until(lambda: not client._links.by_replica)
    health = await client.health()
    assert (health.is_healthy, health.is_asleep) == (True, True)
    assert list(await client.stats()) == list(await client.inspect()) == []
    client._links.watch.fleet = Fleet(1, 1)  # as if it had just gone
    assert await client._links._patience_s() == pytest.approx(Timeouts().wake_s, abs=1)
    requests = [make_request(f"wake-{n}", (n + 1,), 20, ignore_eos=True) for n in range(12)]
    answers = await asyncio.gather(*(collect(client, request) for request in requests))
    assert answers == [continuation(request) for request in requests]
    assert not (await client.health()).is_asleep


async def test_an_update_under_load_drops_nothing(cluster: RayCluster) -> None:
    """A changed limit first, then another checkpoint: what has begun ends where it is, what comes finds the new one."""
    from ray import serve

    from service.deployment import engine_application
    from service.ray_client import RayEngineClient

    app, load = "updated", partial(load_paced, step_s=0.005)

    async def deploy(config: EngineConfig, load: LoadEngine) -> None:
        await cluster.deploy(lambda: engine_application(config, num_cpus=0.1, load=load), app)

    await deploy(CONFIG, load)
    client = await RayEngineClient.connect(engine_of(app))
    num_sent, is_updated = 0, False
    prints: list[str] = []

    async def ask_on_and_on(name: str) -> None:
        nonlocal num_sent
        while not is_updated:
            num_sent += 1
            request = make_request(f"{name}-{num_sent}", (num_sent % 40 + 1, 2), 60, ignore_eos=True)
            outputs = [output async for output in client.generate(request)]
            assert [token for output in outputs for token in output.new_token_ids] == continuation(request)
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            assert not any(output.num_resumptions for output in outputs)
            prints.append(outputs[0].system_fingerprint)

    async with asyncio.timeout(300), asyncio.TaskGroup() as readers:
        for n in range(3):
            readers.create_task(ask_on_and_on(f"update{n}"))
        for config, other in ((replace(CONFIG, max_num_seqs=4), load), (CONFIG, partial(load_other, step_s=0.005))):
            before = {stats.replica for stats in await client.stats()}
            await deploy(config, other)
            while before & {stats.replica for stats in await client.stats()} or not client._links.by_replica:
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        is_updated = True
    first, last = prints[0], prints[-1]
    assert first != last
    assert set(prints) == {first, last}, "each answer tells which checkpoint gave it"
    await client.close()
    await asyncio.to_thread(serve.delete, app)


async def test_a_gateway_leaves_engines_with_another_tokenizer_to_others(cluster: RayCluster) -> None:
    from ray import serve

    from service.deployment import engine_application
    from service.ray_client import RayEngineClient
    from service.ray_link import Timeouts

    app = "retokenized"

    async def deploy(tokenizer: str) -> None:
        load = partial(load_with_tokenizer, tokenizer=tokenizer)
        await cluster.deploy(lambda: engine_application(CONFIG, num_cpus=0.1, drain_timeout_s=5, load=load), app)

    async def connect(tokenizer: str) -> RayEngineClient:
        return await RayEngineClient.connect(engine_of(app), Timeouts(resume_s=0.5), tokenizer)

    await deploy("old")
    old = await connect("old")
    with pytest.raises(EngineDeadError, match="another tokenizer"):
        await connect("new")
    under_way = make_request("under way", (7,), 300, ignore_eos=True)
    answer = asyncio.create_task(collect(old, under_way))
    await asyncio.sleep(0.2)
    await deploy("new")
    assert await answer == continuation(under_way), "an engine that goes ends what it has"
    async with asyncio.timeout(120):
        while (await old.health()).is_healthy:
            await asyncio.sleep(0.1)
        with pytest.raises(EngineDeadError, match="another tokenizer"):
            await collect(old, make_request("too late", (7,), 5))
        assert "another tokenizer" in (await old.health()).reason
    new = await connect("new")
    request = make_request("new", (7,), 20, ignore_eos=True)
    assert await collect(new, request) == continuation(request)
    assert [stats.num_generated_tokens for stats in await new.stats()] == [20]
    for client in (old, new):
        await client.close()
    await asyncio.to_thread(serve.delete, app)
