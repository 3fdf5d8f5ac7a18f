"""A request that runs elsewhere has one end for its reader, whatever happens and in whatever order."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.request import FinishReason, RequestOutput
from service.flight import EngineLostError, Flight


async def take(flight: Flight) -> RequestOutput:
    return await asyncio.wait_for(flight.take(), 60)


async def test_outputs_are_read_as_they_come_and_merged_when_they_wait() -> None:
    flight = Flight("a")
    flight.put(RequestOutput("a", (1,)))
    assert await take(flight) == RequestOutput("a", (1,))
    flight.put(RequestOutput("a", (2,)))
    flight.put(RequestOutput("a", (3,), FinishReason.LENGTH))
    assert await take(flight) == RequestOutput("a", (2, 3), FinishReason.LENGTH)
    assert flight.is_finished


@pytest.mark.parametrize("is_read", [True, False])
async def test_what_came_before_a_loss_is_read_before_it(is_read: bool) -> None:
    flight = Flight("a")
    flight.put(RequestOutput("a", (1,)))
    before = (await take(flight)).new_token_ids if is_read else ()
    flight.put(RequestOutput("a", (2,)))
    flight.lose("lost")
    output = await take(flight)
    assert before + output.new_token_ids == (1, 2)
    assert not output.is_finished
    with pytest.raises(EngineLostError, match="lost"):
        await take(flight)


@pytest.mark.parametrize(
    "last",
    [
        RequestOutput("a", (2,), FinishReason.ERROR, error="lost", is_engine_failure=True),
        RequestOutput("a", (2,), FinishReason.ABORT),
    ],
)
async def test_an_engine_that_fails_is_lost(last: RequestOutput) -> None:
    flight = Flight("a")
    flight.put(RequestOutput("a", (1,)))
    flight.put(last)
    flight.put(RequestOutput("a", (3,), FinishReason.LENGTH))
    assert await take(flight) == RequestOutput("a", (1, 2))
    with pytest.raises(EngineLostError):
        await take(flight)


async def test_a_request_that_fails_by_itself_ends() -> None:
    flight = Flight("a")
    error = RequestOutput("a", finish_reason=FinishReason.ERROR, error="a grammar too complex")
    flight.put(error)
    flight.lose("lost")
    assert await take(flight) == error


async def test_nothing_comes_after_the_end() -> None:
    flight = Flight("a")
    flight.put(RequestOutput("a", (1,), FinishReason.LENGTH))
    flight.put(RequestOutput("a", (2,)))
    flight.lose("lost")
    assert await take(flight) == RequestOutput("a", (1,), FinishReason.LENGTH)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(flight.take(), 0.01)
