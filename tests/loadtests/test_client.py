"""One request against servers that behave and misbehave: always one record, and the right one."""

import asyncio
from time import perf_counter

import pytest

from loadtests.client import CompletionClient
from loadtests.errors import ServerError
from loadtests.record import Phase, RequestRecord
from loadtests.target import resolve_target
from loadtests.workload import Workload
from tests.loadtests.scripted_server import Script, ScriptedServer, serving

TOLERANCE_S = 0.05


async def complete(server: ScriptedServer, *, timeout_s: float = 5.0, count: int = 1) -> list[RequestRecord]:
    client = CompletionClient(resolve_target(server.url), timeout_s=timeout_s, api_key="secret")
    try:
        return [await client.complete(Workload().body(i), i, Phase.MEASURED) for i in range(count)]
    finally:
        client.close()


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("is_chunked", [True, False])
async def test_times_are_those_of_the_server(newline: bytes, is_chunked: bool) -> None:
    script = Script(delays_s=(0.10, 0.02, 0.06, 0.04), newline=newline, is_chunked=is_chunked)
    async with serving(script) as server:
        (record,) = await complete(server)
    assert record.is_success, record.message
    assert (record.output_tokens, record.prompt_tokens, record.finish_reason) == (4, 8, "length")
    assert record.ttft_s is not None
    assert record.tpot_s is not None
    sent_s = server.sent_s[0]
    assert len(record.times_s) == 4
    for seen, sent in zip(record.times_s, sent_s, strict=True):
        assert sent - 0.001 <= seen <= sent + TOLERANCE_S
    assert record.ttft_s >= 0.10
    assert record.e2e_s >= 0.22
    assert record.tpot_s == pytest.approx((sent_s[-1] - sent_s[0]) / 3, abs=TOLERANCE_S)


async def test_several_tokens_in_one_event_are_counted_by_usage() -> None:
    async with serving(Script(delays_s=(0.01,) * 5, tokens_per_event=4)) as server:
        (record,) = await complete(server)
    assert record.output_tokens == 20
    assert record.tokens_per_event == 4
    assert record.tpot_s == pytest.approx((record.times_s[-1] - record.times_s[0]) / 19)


async def test_events_are_counted_where_there_is_no_usage() -> None:
    async with serving(Script(delays_s=(0, 0), has_usage=False)) as server:
        (record,) = await complete(server)
    assert record.is_success
    assert (record.output_tokens, record.has_usage) == (2, False)


async def test_a_connection_is_kept() -> None:
    async with serving(Script()) as server:
        records = await complete(server, count=5)
    assert all(record.is_success for record in records)
    assert server.num_connections == 1


async def test_a_connection_that_the_server_closes_is_opened_again() -> None:
    async with serving(Script(keep_alive=False)) as server:
        records = await complete(server, count=3)
    assert all(record.is_success for record in records)
    assert server.num_connections == 3


async def test_a_kept_connection_that_is_closed_instead_of_an_answer_is_no_failure() -> None:
    scripts = [Script(), Script(is_silent=True), Script()]
    async with serving(scripts.__getitem__) as server:
        records = await complete(server, count=2)
    assert [record.error for record in records] == [None, None]
    assert server.num_connections == 2


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (Script(status=503), "http_503", "scripted 503"),
        (Script(status=400), "http_400", "scripted 400"),
        (Script(is_silent=True), "disconnected", "before the end"),
        (Script(delays_s=(0,) * 9, cut_after=3), "disconnected", "before the end"),
        (Script(delays_s=(0,) * 9, cut_after=0), "disconnected", "before the end"),
        (Script(delays_s=(0,) * 9, error_after=3), "stream_error", "scripted failure"),
        (Script(finish_reason="abort"), "stream_error", "abort"),
        (Script(has_end=False), "incomplete", "finish reason"),
        (Script(delays_s=()), "empty", "without a token"),
        (Script(delays_s=(30.0,)), "timeout", "0.3 s"),
    ],
)
async def test_failures_have_a_kind_and_the_server_s_words(script: Script, error: str, message: str) -> None:
    async with serving(script) as server:
        (record,) = await complete(server, timeout_s=0.3)
    assert record.error == error
    assert record.message is not None
    assert message in record.message


async def test_what_came_before_a_failure_is_kept() -> None:
    async with serving(Script(delays_s=(0.01,) * 9, cut_after=3)) as server:
        (record,) = await complete(server)
    assert len(record.times_s) == 3
    assert record.status == 200
    assert not record.is_success


async def test_the_next_request_after_a_failure_is_answered() -> None:
    scripts = [Script(cut_after=1), Script(status=503), Script(delays_s=(30.0,)), Script()]
    async with serving(scripts.__getitem__) as server:
        records = await complete(server, timeout_s=0.3, count=4)
    assert [record.error for record in records] == ["disconnected", "http_503", "timeout", None]


async def test_nobody_listens() -> None:
    async with serving(Script()) as server:
        pass
    (record,) = await complete(server)
    assert record.error == "unreachable"


async def test_hanging_up_ends_every_request_with_what_had_come() -> None:
    async with serving(Script(delays_s=(0.01, 0.01, 30.0))) as server:
        client = CompletionClient(resolve_target(server.url), timeout_s=5.0)
        waiting = [asyncio.create_task(client.complete(b"{}", i, Phase.FILLER)) for i in range(3)]
        await asyncio.sleep(0.2)
        started_s = perf_counter()
        client.abandon()
        records = await asyncio.gather(*waiting)
        late = await client.complete(b"{}", 3, Phase.FILLER)
    assert perf_counter() - started_s < 1.0
    assert [len(record.times_s) for record in records] == [2, 2, 2]
    assert {record.error for record in (*records, late)} == {"disconnected"}
    assert len(server.bodies) == 3


async def test_a_late_start_is_measured_from_the_plan() -> None:
    async with serving(Script()) as server:
        client = CompletionClient(resolve_target(server.url), timeout_s=5.0)
        record = await client.complete(b"{}", 0, Phase.MEASURED, planned_s=perf_counter() - 0.5)
        client.close()
    assert 0.5 <= record.lateness_s < 0.6
    assert record.e2e_s < 0.4


async def test_the_first_model_is_the_one_asked_for() -> None:
    async with serving(Script()) as server:
        client = CompletionClient(resolve_target(server.url), timeout_s=5.0)
        assert await client.first_model() == "scripted"
        client.close()
    with pytest.raises(ServerError, match=server.url):
        await CompletionClient(resolve_target(server.url), timeout_s=5.0).first_model()
