"""A request that runs elsewhere has one end for its reader, whatever happens and in whatever order."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.errors import EngineDeadError
from service.engine.request import FinishReason, RequestOutput
from service.flight import Flight


async def take(flight: Flight) -> RequestOutput:
    return await asyncio.wait_for(flight.take(), 1)


async def test_outputs_are_read_as_they_come_and_merged_when_they_wait() -> None:
    flight = Flight("a")
    flight.put(RequestOutput("a", (1,)))
    assert await take(flight) == RequestOutput("a", (1,))
    flight.put(RequestOutput("a", (2,)))
    flight.put(RequestOutput("a", (3,), FinishReason.LENGTH))
    assert await take(flight) == RequestOutput("a", (2, 3), FinishReason.LENGTH)
    assert flight.is_finished


async def test_a_failure_before_any_output_is_an_error() -> None:
    flight = Flight("a")
    flight.fail("lost")
    with pytest.raises(EngineDeadError, match="lost"):
        await take(flight)


@pytest.mark.parametrize("is_read", [True, False])
async def test_a_failure_after_an_output_is_a_last_output(is_read: bool) -> None:
    flight = Flight("a")
    flight.put(RequestOutput("a", (1,)))
    before = (await take(flight)).new_token_ids if is_read else ()
    flight.fail("lost")
    output = await take(flight)
    assert before + output.new_token_ids == (1,)
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "lost")


async def test_nothing_comes_after_the_end() -> None:
    flight = Flight("a")
    flight.put(RequestOutput("a", (1,), FinishReason.LENGTH))
    flight.put(RequestOutput("a", (2,)))
    flight.fail("lost")
    assert await take(flight) == RequestOutput("a", (1,), FinishReason.LENGTH)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(flight.take(), 0.01)
