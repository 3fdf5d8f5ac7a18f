"""The engine client over real Ray replicas, all well: same answers as one engine, nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from service.config import EngineConfig
from service.engine.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    KeyOverloadedError,
    RequestRejectedError,
)
from service.engine.request import FinishReason, Request
from service.ray_cluster import RayCluster
from service.wire import Verdict
from tests.engine.scripted import continuation, make_request
from tests.service.engines import MAX_MODEL_LEN, engine_of, load_paced

if TYPE_CHECKING:
    from service.ray_client import RayEngineClient

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

CONFIG = EngineConfig("scripted", max_num_seqs=8, max_num_waiting=2, max_num_batched_tokens=256, block_size=32)
NUM_REPLICAS = 2
# A step takes 2 ms and a call as long; the rest is for a machine that has other things to do. Were they not given up,
# requests would hold their memory for 8 s.
FREED_WITHIN_S = 5.0
CAPACITY = NUM_REPLICAS * (CONFIG.max_num_seqs + CONFIG.max_num_waiting)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: RayCluster) -> AsyncIterator[RayEngineClient]:
    from ray import serve

    from service.deployment import engine_application
    from service.ray_client import RayEngineClient

    await cluster.deploy(lambda: engine_application(CONFIG, num_replicas=NUM_REPLICAS, load=load_paced), "well")
    client = await RayEngineClient.connect(engine_of("well"))
    yield client
    await client.close()
    await asyncio.to_thread(serve.delete, "well")


async def collect(client: RayEngineClient, request: Request, timeout_s: float = 120) -> list[int]:
    """All ids of a request; checks that it has one end, at the end."""
    ids: list[int] = []
    async with asyncio.timeout(timeout_s):
        outputs = [output async for output in client.generate(request)]
    for output in outputs:
        assert output.request_id == request.request_id
        ids += output.new_token_ids
    assert [output.is_finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].timing is not None
    return ids


async def test_a_deadline_ends_a_request_with_what_there_is(client: RayEngineClient) -> None:
    request = replace(make_request("late", max_tokens=4000, ignore_eos=True), timeout_s=0.3)
    async with asyncio.timeout(120):
        outputs = [output async for output in client.generate(request)]
    assert outputs[-1].finish_reason is FinishReason.DEADLINE
    ids = [token for output in outputs for token in output.new_token_ids]
    assert ids == continuation(request)[: len(ids)]
    assert ids
    await until(partial(is_idle, client))


async def test_a_deadline_counts_the_time_without_a_replica(client: RayEngineClient) -> None:
    request = replace(make_request("never sent"), timeout_s=0.0)
    outputs = [output async for output in client.generate(request)]
    assert [output.finish_reason for output in outputs] == [FinishReason.DEADLINE]


async def is_idle(client: RayEngineClient) -> bool:
    stats = await client.stats()
    return len(stats) == NUM_REPLICAS and all(
        s.num_running == s.num_waiting == 0 and s.num_free_blocks == s.num_blocks for s in stats
    )


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> float:
    """Seconds until `condition` held."""
    started_s = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)
    return time.monotonic() - started_s


async def test_many_requests_at_once_get_their_own_tokens_from_all_replicas(client: RayEngineClient) -> None:
    before = {s.replica: s.num_generated_tokens for s in await client.stats()}
    requests = [make_request(f"many-{n}", (n + 1, 2, 3), 20 + n, ignore_eos=True) for n in range(CAPACITY)]
    answers = await asyncio.gather(*(collect(client, request) for request in requests))
    assert answers == [continuation(request) for request in requests]
    work = [s.num_generated_tokens - before[s.replica] for s in await client.stats()]
    assert min(work) > sum(work) / 4
    assert await is_idle(client)


async def test_a_burst_is_spread_evenly_though_it_would_fit_on_one_replica(client: RayEngineClient) -> None:
    before = {s.replica: s.num_generated_tokens for s in await client.stats()}
    requests = [make_request(f"burst-{n}", (n + 1, 2), 20, ignore_eos=True) for n in range(8)]
    await asyncio.gather(*(collect(client, request) for request in requests))
    assert [s.num_generated_tokens - before[s.replica] for s in await client.stats()] == [80, 80]


async def test_choices_of_one_prompt_go_to_one_replica(client: RayEngineClient) -> None:
    for family in range(4):
        before = {s.replica: s.num_generated_tokens for s in await client.stats()}
        requests = [
            make_request(f"family-{family}-{n}", (family, 7), 5, ignore_eos=True, seed=family, choice_index=n)
            for n in range(6)
        ]
        await asyncio.gather(*(collect(client, request) for request in requests))
        assert sorted(s.num_generated_tokens - before[s.replica] for s in await client.stats()) == [0, 30]


async def replicas_of(client: RayEngineClient, requests: list[Request]) -> list[int]:
    """Tokens that each replica generates for these, which come one after the other."""
    before = {s.replica: s.num_generated_tokens for s in await client.stats()}
    for request in requests:
        await collect(client, request)
    return [s.num_generated_tokens - before[s.replica] for s in await client.stats()]


async def test_requests_of_a_session_go_to_one_replica(client: RayEngineClient) -> None:
    requests = [make_request(f"session-{n}", (n + 1, 7), 5, ignore_eos=True) for n in range(5)]
    work = await replicas_of(client, [replace(request, session_id="one") for request in requests])
    assert sorted(work) == [0, 25]


async def test_prompts_that_begin_alike_go_to_one_replica_unless_it_has_too_much_to_do(
    client: RayEngineClient,
) -> None:
    requests = [make_request(f"alike-{n}", (11,) * 64 + (n,), 5, ignore_eos=True) for n in range(6)]
    assert sorted(await replicas_of(client, requests)) == [0, 30]
    assert sum(s.num_hit_tokens for s in await client.stats()) > 0
    before = {s.replica: s.num_generated_tokens for s in await client.stats()}
    crowd = [make_request(f"crowd-alike-{n}", (11,) * 64 + (n,), 40, ignore_eos=True) for n in range(12)]
    await asyncio.gather(*(collect(client, request) for request in crowd))
    assert min(s.num_generated_tokens - before[s.replica] for s in await client.stats()) >= 4 * 40


async def test_a_resumed_request_goes_on_where_it_was(client: RayEngineClient) -> None:
    whole = make_request("whole", max_tokens=30, ignore_eos=True)
    ids = await collect(client, whole)
    rest = make_request("rest", max_tokens=30, ignore_eos=True, output_token_ids=tuple(ids[:11]))
    assert ids[:11] + await collect(client, rest) == ids


async def test_a_replica_that_gives_other_bytes_refuses_to_go_on(client: RayEngineClient) -> None:
    request = make_request("elsewhere", max_tokens=30, output_token_ids=(1, 2))
    own = (await client.info()).system_fingerprint
    for fingerprint, is_refused in (("0123456789ab-avx2-float32-float32", True), (own, False)):
        call, verdict = await client._links.ask(request, avoid=set(), system_fingerprint=fingerprint)
        assert isinstance(verdict, Verdict)
        assert isinstance(verdict.refusal, EngineDeadError) is is_refused
        call.cancel()
    await until(partial(is_idle, client))


async def test_tokens_come_as_they_are_made(client: RayEngineClient) -> None:
    outputs = [o async for o in client.generate(make_request("paced", max_tokens=50, ignore_eos=True))]
    assert len(outputs) > 10


async def test_a_request_that_can_never_run_is_refused(client: RayEngineClient) -> None:
    with pytest.raises(RequestRejectedError, match="4096"):
        await collect(client, make_request("long", (1,) * MAX_MODEL_LEN, 1))
    with pytest.raises(RequestRejectedError):
        await collect(client, make_request("unknown token", (1000,), 1))
    assert await is_idle(client)


async def test_an_id_in_use_is_refused_and_does_no_harm(client: RayEngineClient) -> None:
    request = make_request("twice", max_tokens=100, ignore_eos=True)
    first = asyncio.create_task(collect(client, request))
    await asyncio.sleep(0.05)
    with pytest.raises(RequestRejectedError, match="in use"):
        await collect(client, request)
    assert await first == continuation(request)


async def test_full_replicas_refuse_with_a_time_to_come_back(client: RayEngineClient) -> None:
    requests = [make_request(f"crowd-{n}", max_tokens=100, ignore_eos=True) for n in range(3 * CAPACITY)]
    answers = await asyncio.gather(*(collect(client, request) for request in requests), return_exceptions=True)
    refused = [a for a in answers if isinstance(a, EngineOverloadedError)]
    assert all(error.retry_after_s > 0 for error in refused)
    served = [(r, a) for r, a in zip(requests, answers, strict=True) if not isinstance(a, EngineError)]
    assert len(served) >= CAPACITY
    assert len(served) + len(refused) == len(requests)
    assert all(answer == continuation(request) for request, answer in served)
    assert await is_idle(client)


async def test_leaving_the_generator_frees_the_memory_at_once(client: RayEngineClient) -> None:
    async with aclosing(client.generate(make_request("left", max_tokens=4000, ignore_eos=True))) as outputs:
        await anext(outputs)
        assert not await is_idle(client)
    assert await until(lambda: is_idle(client)) < FREED_WITHIN_S


@pytest.mark.parametrize("after_s", [0.0, 0.0005, 0.001, 0.002, 0.004, 0.1])
async def test_cancelling_the_reader_frees_the_memory_at_any_time(client: RayEngineClient, after_s: float) -> None:
    requests = [make_request(f"cut-{after_s}-{n}", max_tokens=4000, ignore_eos=True) for n in range(8)]
    readers = [asyncio.create_task(collect(client, request)) for request in requests]
    await asyncio.sleep(after_s)
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)
    assert all(reader.cancelled() for reader in readers)
    await asyncio.sleep(0.02)  # what was still on its way to a replica arrives, and is then taken back
    assert await until(lambda: is_idle(client)) < FREED_WITHIN_S


async def test_gateways_do_not_mix(client: RayEngineClient) -> None:
    from service.ray_client import RayEngineClient

    other = await RayEngineClient.connect(engine_of("well"))
    requests = [make_request(f"mine-{n}", (n + 1,), 100, ignore_eos=True) for n in range(6)]
    theirs = [make_request(f"theirs-{n}", (n + 1,), 4000, ignore_eos=True) for n in range(6)]
    readers = [asyncio.create_task(collect(other, request)) for request in theirs]
    mine = asyncio.gather(*(collect(client, request) for request in requests))
    await asyncio.sleep(0.05)
    await other.close()
    ends = await asyncio.gather(*readers, return_exceptions=True)
    assert await mine == [continuation(request) for request in requests]
    assert all(isinstance(end, EngineError | AssertionError) for end in ends)
    assert await until(lambda: is_idle(client)) < FREED_WITHIN_S


async def test_what_a_closed_client_was_doing_ends_with_an_error(client: RayEngineClient) -> None:
    from service.ray_client import RayEngineClient

    other = await RayEngineClient.connect(engine_of("well"))
    outputs = other.generate(make_request("closed", max_tokens=4000, ignore_eos=True))
    await anext(outputs)
    await other.close()
    last = [output async for output in outputs][-1]
    assert (last.finish_reason, last.error) == (FinishReason.ERROR, "the server is shutting down")
    with pytest.raises(EngineError):
        await collect(other, make_request("late"))


async def test_requests_of_a_stream_that_breaks_alone_go_on_and_it_is_opened_again(client: RayEngineClient) -> None:
    requests = [make_request(f"broken-{n}", max_tokens=300, ignore_eos=True) for n in range(NUM_REPLICAS)]
    readers = [asyncio.create_task(collect(client, request)) for request in requests]
    await asyncio.sleep(0.2)
    links = list(client._links.by_replica.values())
    assert len(links) == NUM_REPLICAS
    for link in links:
        link.stream.cancel()
    assert await asyncio.gather(*readers) == [continuation(request) for request in requests]
    assert not any(link in client._links.by_replica.values() for link in links)
    assert await until(lambda: is_idle(client)) < FREED_WITHIN_S
    again = [make_request(f"again-{n}", (n + 1,), 20, ignore_eos=True) for n in range(4)]
    assert await asyncio.gather(*(collect(client, r) for r in again)) == [continuation(r) for r in again]


async def test_info_and_health(client: RayEngineClient) -> None:
    assert (await client.info()).max_model_len == MAX_MODEL_LEN
    health = await client.health()
    assert health.is_healthy


async def test_of_all_refusals_the_one_that_ends_first_is_passed_on() -> None:
    from service.ray_client import _soonest

    late, soon, dead = EngineOverloadedError("a", 9.0), KeyOverloadedError("b", 2.0), EngineDeadError("c")
    assert _soonest(None, late) is late
    assert _soonest(late, soon) is _soonest(soon, late) is soon
    assert _soonest(late, dead) is dead
    assert _soonest(dead, late) is late
