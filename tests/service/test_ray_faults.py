"""Real Ray replicas and gateways that die, hang or have to go: everybody gets an answer, and service comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from service.config import EngineConfig
from service.engine.errors import EngineDeadError, FatalRequestError
from service.engine.request import FinishReason, Request, RequestOutput
from service.errors import EngineStartError, NoMemoryError
from service.ray_cluster import RayCluster
from tests.engine.scripted import continuation, make_request
from tests.service.engines import POISON, STALL, engine_of, load_paced, load_too_much, load_with_a_bug

if TYPE_CHECKING:
    from service.ray_client import RayEngineClient

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

CONFIG = EngineConfig("scripted", max_num_seqs=8, max_num_batched_tokens=256, stall_timeout_s=0.5)
ROOT = Path(__file__).resolve().parents[2]
# How long what has to come is waited for, however much else the machine has to do.
PATIENCE_S = 120.0


async def deploy(
    cluster: RayCluster,
    app: str,
    num_replicas: int,
    *,
    config: EngineConfig = CONFIG,
    resume_timeout_s: float = 0.0,
    silence_timeout_s: float = 6.0,
) -> RayEngineClient:
    from service.deployment import engine_application

    load = partial(load_paced, step_s=0.01)
    # Where a test fails, its requests are not to hold up the end.
    build = partial(engine_application, config, num_cpus=0.1, drain_timeout_s=10, load=load)
    await cluster.deploy(lambda: build(num_replicas=num_replicas), app)
    return await connect(app, resume_timeout_s, silence_timeout_s)


async def connect(app: str, resume_timeout_s: float, silence_timeout_s: float = 6.0) -> RayEngineClient:
    from service.ray_client import RayEngineClient
    from service.ray_link import Timeouts

    timeouts = Timeouts(replica_s=PATIENCE_S, resume_s=resume_timeout_s, silence_s=silence_timeout_s)
    return await RayEngineClient.connect(engine_of(app), timeouts)


@pytest_asyncio.fixture(loop_scope="session")
async def app(cluster: RayCluster, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A name for an application, which is deleted in the end."""
    from ray import serve

    name = request.node.name
    yield name
    await asyncio.to_thread(serve.delete, name)


class Reading:
    """Reads a request's outputs in a task of its own; waiting for it gives all of them."""

    def __init__(self, client: RayEngineClient, request: Request) -> None:
        self.outputs: list[RequestOutput] = []
        self._task = asyncio.create_task(self._read(client, request))

    def __await__(self) -> Generator[Any, None, list[RequestOutput]]:
        yield from self._task.__await__()
        return self.outputs

    async def _read(self, client: RayEngineClient, request: Request) -> None:
        async with asyncio.timeout(PATIENCE_S):
            async for output in client.generate(request):
                self.outputs.append(output)


async def read(client: RayEngineClient, request: Request) -> list[RequestOutput]:
    return await Reading(client, request)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def until_begun(*readings: Reading) -> None:
    """Until each has its first tokens."""
    await until(lambda: all(reading.outputs for reading in readings))


async def until_busy(client: RayEngineClient, *num_requests: int) -> None:
    """Until the replicas have so many requests each, whatever their order."""
    async with asyncio.timeout(PATIENCE_S):
        while sorted(s.num_running + s.num_waiting for s in await client.stats()) != sorted(num_requests):
            await asyncio.sleep(0.02)


def ids_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]


def replica_pids(app: str) -> list[int]:
    """Processes of an application's replicas, by the title Ray gives them."""
    title = f"ray::ServeReplica:{app}:".encode()
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists() and path.read_bytes().startswith(title)
    ]


async def until_healthy(client: RayEngineClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not (await client.health()).is_healthy:
            await asyncio.sleep(0.05)


async def test_requests_of_a_killed_replica_go_on_at_another(cluster: RayCluster, app: str) -> None:
    client = await deploy(cluster, app, 2, resume_timeout_s=PATIENCE_S)
    requests = [make_request(f"r{n}", (n + 1,), 150, ignore_eos=True) for n in range(8)]
    requests += [replace(make_request("late", (9,), 4000, ignore_eos=True), timeout_s=3.0)]
    readers = [Reading(client, request) for request in requests]
    await until_begun(*readers)
    os.kill(replica_pids(app)[0], signal.SIGKILL)
    *answers, late = await asyncio.gather(*readers)
    assert [ids_of(outputs) for outputs in answers] == [continuation(request) for request in requests[:-1]]
    assert 0 < sum(output.num_resumptions for outputs in answers for output in outputs) < len(answers)
    for request, outputs in zip(requests, [*answers, late], strict=True):
        assert {output.request_id for output in outputs} == {request.request_id}
        assert [output.is_finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert late[-1].finish_reason is FinishReason.DEADLINE
    assert ids_of(late) == continuation(requests[-1])[: len(ids_of(late))]
    assert (await client.health()).is_healthy
    await client.close()


async def test_the_only_replica_dies_and_its_requests_go_on_at_the_next(cluster: RayCluster, app: str) -> None:
    # The replica is not to be found stuck before it is killed.
    patient = await deploy(cluster, app, 1, config=replace(CONFIG, stall_timeout_s=60), resume_timeout_s=PATIENCE_S)
    hasty, client = await connect(app, 0.2), await connect(app, 0.0)
    survivor = make_request("survivor", max_tokens=100, ignore_eos=True)
    giving_up = Reading(hasty, make_request("hasty", max_tokens=4000, ignore_eos=True))
    long = Reading(client, make_request("long", max_tokens=4000, ignore_eos=True))
    await until_begun(giving_up, long)
    surviving = Reading(patient, survivor)
    await until_begun(surviving)
    # Held up behind a step that does not end, this one has no output yet when the replica dies.
    stalled = Reading(client, make_request("stalled", (STALL,)))
    await until_busy(client, 4)
    os.kill(replica_pids(app)[0], signal.SIGKILL)
    assert (await long)[-1].finish_reason is FinishReason.ERROR
    last = (await giving_up)[-1]
    assert last.finish_reason is FinishReason.ERROR
    assert "no other could go on with it within 0.2 s" in (last.error or "")
    with pytest.raises(EngineDeadError):
        await stalled
    assert not (await client.health()).is_healthy
    assert await client.stats() == []
    # A request that comes now waits for the next replica.
    request = make_request("patient", max_tokens=20, ignore_eos=True)
    assert ids_of(await read(client, request)) == continuation(request)
    answer = await surviving
    assert ids_of(answer) == continuation(survivor)
    assert sum(output.num_resumptions for output in answer) == 1
    await until_healthy(client)
    for each in (client, patient, hasty):
        await each.close()


async def test_a_request_that_brings_replicas_down_is_given_up_after_two(cluster: RayCluster, app: str) -> None:
    client = await deploy(cluster, app, 3, resume_timeout_s=PATIENCE_S)
    requests = [make_request(f"r{n}", (n + 1,), 200, ignore_eos=True) for n in range(12)]
    readers = [Reading(client, request) for request in requests]
    await until_begun(*readers)
    with pytest.raises(FatalRequestError, match="two engine replicas"):
        await read(client, make_request("poisoned", (POISON,)))
    assert sum(link.health.is_healthy for link in client._links.by_replica.values()) == 1
    for reader, request in zip(readers, requests, strict=True):
        outputs = await reader
        assert ids_of(outputs) == continuation(request)
        assert sum(output.num_resumptions for output in outputs) <= 2
    await client.close()


async def test_a_replica_that_is_stopped_loses_its_requests_and_may_come_back(
    cluster: RayCluster, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await deploy(cluster, app, 2, resume_timeout_s=PATIENCE_S, silence_timeout_s=2.0)
    requests = [make_request(f"r{n}", (n + 1,), 150, ignore_eos=True) for n in range(8)]
    readers = [Reading(client, request) for request in requests]
    await until_begun(*readers)
    stopped = replica_pids(app)[0]
    os.kill(stopped, signal.SIGSTOP)
    # Among them one that was sent to the stopped replica and not answered: it is asked for elsewhere, too.
    requests += [make_request(f"later {n}", (n + 11,), 20, ignore_eos=True) for n in range(4)]
    readers += [Reading(client, request) for request in requests[8:]]
    try:
        answers = await asyncio.gather(*readers)
    finally:
        os.kill(stopped, signal.SIGCONT)
    for request, outputs in zip(requests, answers, strict=True):
        assert ids_of(outputs) == continuation(request), request.request_id
        assert [output.is_finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert caplog.text.count("goes on at") == sum(output.num_resumptions for outputs in answers for output in outputs)
    assert "has said nothing" in caplog.text
    await until_busy(client, 0, 0)
    again = [make_request(f"again {n}", (n + 1,), 20, ignore_eos=True) for n in range(8)]
    assert [ids_of(await read(client, request)) for request in again] == [continuation(request) for request in again]
    await client.close()


async def test_a_gateway_that_was_stopped_does_not_take_its_own_silence_for_the_replicas(
    cluster: RayCluster, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await deploy(cluster, app, 1, silence_timeout_s=2.0)
    request = make_request("long", (1,), 300, ignore_eos=True)
    reading = Reading(client, request)
    await until_begun(reading)
    time.sleep(3)  # nothing of this process runs
    assert ids_of(await reading) == continuation(request)
    assert "has said nothing" not in caplog.text
    await client.close()


async def test_an_engine_whose_step_fails_answers_all_and_is_replaced(
    cluster: RayCluster, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await deploy(cluster, app, 1)
    long = Reading(client, make_request("long", max_tokens=4000, ignore_eos=True))
    await until_begun(long)
    with pytest.raises(EngineDeadError, match="internal error"):
        await read(client, make_request("poisoned", (POISON,)))
    outputs = await long
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert "internal error" in (outputs[-1].error or "")
    with pytest.raises(EngineDeadError):
        await read(client, make_request("at once"))
    assert not (await client.health()).is_healthy
    # The reason is in another process, and an operator has to see it here.
    assert "RuntimeError: a poisoned prompt" in caplog.text
    await until_healthy(client)
    request = make_request("later", max_tokens=20, ignore_eos=True)
    assert ids_of(await read(client, request)) == continuation(request)
    await client.close()


async def test_a_dead_engine_among_healthy_ones_gets_no_requests(cluster: RayCluster, app: str) -> None:
    client = await deploy(cluster, app, 2)
    with pytest.raises(EngineDeadError, match="internal error"):
        await read(client, make_request("poisoned", (POISON,)))
    requests = [make_request(f"r{n}", (n + 1,), 20, ignore_eos=True) for n in range(8)]
    answers = await asyncio.gather(*(read(client, request) for request in requests))
    assert [ids_of(outputs) for outputs in answers] == [continuation(request) for request in requests]
    assert (await client.health()).is_healthy
    await client.close()


async def test_a_stuck_engine_turns_red_and_is_replaced(cluster: RayCluster, app: str) -> None:
    client = await deploy(cluster, app, 1)
    stuck = Reading(client, make_request("stuck", (STALL,)))
    async with asyncio.timeout(PATIENCE_S):
        while (await client.health()).is_healthy:
            await asyncio.sleep(0.05)
    with pytest.raises(EngineDeadError, match="step"):
        await stuck
    await until_healthy(client)
    await client.close()


async def test_scaling_down_lets_requests_end_and_scaling_up_is_noticed(cluster: RayCluster, app: str) -> None:
    client = await deploy(cluster, app, 2)
    requests = [make_request(f"r{n}", (n + 1,), 200, ignore_eos=True) for n in range(4)]
    readers = [Reading(client, request) for request in requests]
    await until_begun(*readers)
    smaller = await deploy(cluster, app, 1)
    for reader, request in zip(readers, requests, strict=True):
        assert ids_of(await reader) == continuation(request)
    await until(lambda: len(replica_pids(app)) <= 1)
    assert len(await client.stats()) == 1
    larger = await deploy(cluster, app, 2)
    await until_busy(client, 0, 0)
    for other in (client, smaller, larger):
        await other.close()


async def test_an_engine_that_cannot_start_says_why(cluster: RayCluster, app: str) -> None:
    from service.deployment import engine_application

    with pytest.raises(NoMemoryError, match=r"^not enough memory: it needs 4 TiB, but 1 GiB are available$"):
        await cluster.deploy(lambda: engine_application(CONFIG, num_cpus=0.1, load=load_too_much), app)
    with pytest.raises(EngineStartError, match=r"^the engine did not start: KeyError: 'weights'$"):
        await cluster.deploy(lambda: engine_application(CONFIG, num_cpus=0.1, load=load_with_a_bug), app)


GATEWAY = """
import asyncio, sys
from service.ray_cluster import RayCluster

async def main():
    cluster = RayCluster(sys.argv[1])
    await cluster.start()
    from service.ray_client import RayEngineClient
    from tests.engine.scripted import make_request
    from tests.service.engines import engine_of
    client = await RayEngineClient.connect(engine_of(sys.argv[2]))
    async for _ in client.generate(make_request("orphan", max_tokens=4000, ignore_eos=True)):
        print("token", flush=True)

asyncio.run(main())
"""


async def test_a_killed_gateway_takes_its_requests_with_it(cluster: RayCluster, app: str) -> None:
    import ray

    client = await deploy(cluster, app, 1)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", GATEWAY, address, app]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as gateway:
        assert gateway.stdout is not None
        try:
            line = await asyncio.wait_for(asyncio.to_thread(gateway.stdout.readline), PATIENCE_S)
            assert line == b"token\n"
            assert [s.num_running for s in await client.stats()] == [1]
        finally:
            gateway.kill()
    async with asyncio.timeout(20):  # by itself it would run for twice as long
        while [s.num_running for s in await client.stats()] != [0]:
            await asyncio.sleep(0.02)
    await client.close()
