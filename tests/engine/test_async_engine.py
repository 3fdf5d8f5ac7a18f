from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from service.engine.async_engine import AsyncEngine
from service.engine.errors import EngineDeadError, EngineOverloadedError, RequestRejectedError
from service.engine.local_client import LocalEngineClient
from service.engine.request import FinishReason, RequestOutput
from service.engine.stats import EngineInfo
from service.engine.step import SchedulerOutput, StepOutput
from tests.engine.scripted import ScriptedRunner, continuation, make_engine, make_request

INFO = EngineInfo("", 50, 32, 0, "float32", "float32", "cpu", "scripted", "scripted", 0, 6)


class Gate:
    """Lets the engine step, holds it, or makes it fail."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None
        self.steps_until_closed = -1

    def __call__(self) -> None:
        assert self.open.wait(60)
        self.steps_until_closed -= 1
        if self.steps_until_closed == 0:
            self.open.clear()
        if self.error:
            raise self.error


class StopsBeforeStart(ScriptedRunner):
    """Calls `stop` before anybody is told that a step runs, once `after` steps have been done."""

    def __init__(self, after: int, stop: Callable[[], object]) -> None:
        super().__init__()
        self._left = after
        self._stop = stop

    def execute(self, plan: SchedulerOutput, on_start: Callable[[], None] = lambda: None) -> StepOutput:
        if self._left == 0:
            self._stop()
        else:
            self._left -= 1
        return super().execute(plan, on_start)


def fail() -> None:
    raise ValueError("this step fails")


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def engine(gate: Gate) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(make_engine(on_step=gate), INFO, stall_timeout_s=0.2)
    engine.start()
    yield engine
    gate.open.set()
    await engine.close()


async def collect(engine: AsyncEngine, request_id: str, **kwargs: object) -> list[RequestOutput]:
    request = make_request(request_id, **kwargs)  # type: ignore[arg-type]
    return [output async for output in LocalEngineClient(engine).generate(request)]


async def until(condition: object, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)


async def test_concurrent_requests_each_hear_their_own_text(engine: AsyncEngine) -> None:
    results = await asyncio.gather(*(collect(engine, f"r{i}", prompt=(i, 9), max_tokens=10) for i in range(6)))
    for i, outputs in enumerate(results):
        ids = [token for output in outputs for token in output.new_token_ids]
        assert ids == continuation(make_request("", (i, 9), 10))
        assert [output.is_finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    assert stats.num_generated_tokens == sum(len(o.new_token_ids) for outputs in results for o in outputs)


async def test_a_failing_step_answers_every_waiter_and_turns_health_red(
    engine: AsyncEngine, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open.clear()
    waiting = [asyncio.create_task(collect(engine, f"r{i}")) for i in range(6)]
    await asyncio.sleep(0.01)
    gate.error = ValueError("secret detail")
    with caplog.at_level(logging.CRITICAL):
        gate.open.set()
        results = await asyncio.gather(*waiting)
    for outputs in results:
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert sum(output.is_finished for output in outputs) == 1
        assert outputs[-1].error is not None
        assert "secret" not in outputs[-1].error
    assert not engine.health().is_healthy
    with pytest.raises(EngineDeadError):
        await collect(engine, "late")


async def test_a_failing_step_takes_nothing_of_the_one_before(engine: AsyncEngine) -> None:
    engine._engine.runner = StopsBeforeStart(2, fail)
    outputs = await collect(engine, "a", max_tokens=29, ignore_eos=True)
    request = make_request("", max_tokens=29, ignore_eos=True)
    assert [token for output in outputs for token in output.new_token_ids] == continuation(request)[:2]
    assert outputs[-1].finish_reason is FinishReason.ERROR


async def test_what_a_step_gave_is_heard_while_the_next_one_runs(engine: AsyncEngine, gate: Gate) -> None:
    generator = LocalEngineClient(engine).generate(make_request("a", max_tokens=29, ignore_eos=True))
    gate.steps_until_closed = 2  # The third has begun and does not end.
    async with asyncio.timeout(5):
        for _ in range(2):  # A first token is told at once, a second as the third is begun with.
            assert len((await anext(generator)).new_token_ids) == 1
    await generator.aclose()


async def test_a_first_token_waits_for_no_step_after_it(engine: AsyncEngine) -> None:
    go_on = threading.Event()
    engine._engine.runner = StopsBeforeStart(1, lambda: go_on.wait(60))
    generator = LocalEngineClient(engine).generate(make_request("a", max_tokens=29, ignore_eos=True))
    async with asyncio.timeout(5):
        assert len((await anext(generator)).new_token_ids) == 1
    go_on.set()
    await generator.aclose()


async def test_leaving_a_generator_aborts_within_a_step(engine: AsyncEngine, gate: Gate) -> None:
    generator = LocalEngineClient(engine).generate(make_request("a", max_tokens=29, ignore_eos=True))
    gate.steps_until_closed = 2
    await anext(generator)
    await generator.aclose()
    gate.open.set()
    await until(lambda: engine.stats().num_aborted == 1)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    await until(lambda: engine.health().seconds_since_progress == 0)


async def test_cancelling_the_reader_aborts_too(engine: AsyncEngine, gate: Gate) -> None:
    gate.open.clear()
    task = asyncio.create_task(collect(engine, "a", max_tokens=29, ignore_eos=True))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open.set()
    await until(lambda: engine.stats().num_aborted == 1)


async def test_a_full_queue_is_said_at_once(engine: AsyncEngine, gate: Gate) -> None:
    await asyncio.gather(*(collect(engine, f"w{i}") for i in range(3)))
    gate.open.clear()
    waiting = [asyncio.create_task(collect(engine, f"r{i}")) for i in range(6)]
    await asyncio.sleep(0.01)
    with pytest.raises(EngineOverloadedError) as caught:
        await collect(engine, "one-too-many")
    assert caught.value.retry_after_s > 0
    gate.open.set()
    await asyncio.gather(*waiting)
    await collect(engine, "welcome-again")


async def test_a_bad_request_is_refused_before_any_work(engine: AsyncEngine, gate: Gate) -> None:
    with pytest.raises(RequestRejectedError, match="limit of 32"):
        await collect(engine, "a", max_tokens=99)
    client = LocalEngineClient(engine)
    first = client.generate(make_request("twin", max_tokens=29, ignore_eos=True))
    gate.steps_until_closed = 2
    await anext(first)
    with pytest.raises(RequestRejectedError, match="twin"):
        await anext(client.generate(make_request("twin")))
    await first.aclose()


async def test_health_turns_red_when_a_step_hangs_and_green_again(engine: AsyncEngine, gate: Gate) -> None:
    assert engine.health().is_healthy
    await asyncio.sleep(0.25)
    assert engine.health().is_healthy, "an idle engine is healthy however long it idles"
    gate.open.clear()
    task = asyncio.create_task(collect(engine, "a"))
    await until(lambda: not engine.health().is_healthy)
    assert "no engine step" in engine.health().reason
    gate.open.set()
    await task
    assert engine.health().is_healthy


async def test_closing_answers_whoever_is_left(engine: AsyncEngine, gate: Gate) -> None:
    gate.open.clear()
    task = asyncio.create_task(collect(engine, "a", max_tokens=29, ignore_eos=True))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.01)
    gate.open.set()
    await closing
    outputs = await task
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert sum(output.is_finished for output in outputs) == 1
    with pytest.raises(EngineDeadError):
        await collect(engine, "b")
