"""Several engine answers read as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from service.engine.request import FinishReason, RequestOutput
from service.gateway.errors import GenerationFailedError
from service.gateway.merge import OutputMerge, Source

Listener = Callable[[RequestOutput], None]


class Closed(list[str]):
    """Names of the sources that were cut short before they ended."""


def source(name: str, closed: Closed, *outputs: RequestOutput | Exception) -> Source:
    async def deliver(listener: Listener) -> None:
        is_over = False
        try:
            for output in outputs:
                await asyncio.sleep(0)
                if isinstance(output, Exception):
                    raise output
                is_over = output.is_finished
                listener(output)
            if not is_over:
                await asyncio.Event().wait()
        finally:
            if not is_over:
                closed.append(name)

    return deliver


def token(token_id: int) -> RequestOutput:
    return RequestOutput("r", (token_id,))


END = RequestOutput("r", (), FinishReason.LENGTH)


async def test_outputs_that_came_meanwhile_are_taken_in_one_go_and_in_order() -> None:
    closed = Closed()
    async with OutputMerge([source("a", closed, token(1), token(2), END), source("b", closed, token(9))], 1) as merge:
        await asyncio.sleep(0.01)
        taken = [(arrival.source_index, arrival.output) for arrival in await merge.take()]
    assert [output for index, output in taken if index == 0] == [token(1), token(2), END]
    assert [output for index, output in taken if index == 1] == [token(9)]
    assert closed == ["b"]


async def test_an_error_of_one_source_comes_after_what_came_before_it_and_closes_the_others() -> None:
    closed = Closed()
    sources = [source("a", closed, token(1), ValueError("boom")), source("b", closed)]
    async with OutputMerge(sources, 1) as merge:
        await asyncio.sleep(0.01)
        assert [arrival.output for arrival in await merge.take()] == [token(1)]
        with pytest.raises(ValueError, match="boom"):
            await merge.take()
    assert sorted(closed) == ["a", "b"]


async def test_fail_comes_before_everything_and_wakes_a_reader() -> None:
    closed = Closed()
    async with OutputMerge([source("a", closed, token(1))], 1) as merge:
        await asyncio.sleep(0.01)
        merge.fail(KeyError("gone"))
        merge.fail(ValueError("too late"))
        with pytest.raises(KeyError):
            await merge.take()
    async with OutputMerge([source("b", closed)], 1) as merge:
        asyncio.get_running_loop().call_later(0.01, merge.fail, KeyError("gone"))
        with pytest.raises(KeyError):
            await merge.take()
    assert closed == ["a", "b"]


async def test_drop_cuts_one_source_and_leaves_the_others() -> None:
    closed = Closed()
    async with OutputMerge([source("a", closed), source("b", closed, token(1), END)], 1) as merge:
        await asyncio.sleep(0)
        merge.drop(0)
        taken = []
        while not taken or not taken[-1].output.is_finished:
            taken += await merge.take()
        assert closed == ["a"]


@pytest.mark.parametrize("error", [None, asyncio.CancelledError()])
async def test_a_source_that_just_ends_is_a_failure_not_a_silence(error: BaseException | None) -> None:
    async def quitter(listener: Listener) -> None:
        listener(token(1))
        if error is not None:
            raise error

    async with OutputMerge([quitter], 1) as merge, asyncio.timeout(60):
        await merge.take()
        with pytest.raises(GenerationFailedError):
            await merge.take()


async def test_a_source_that_does_not_end_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def stubborn(listener: Listener) -> None:
        try:
            listener(token(1))
            await asyncio.Event().wait()
        finally:
            await release.wait()

    async with asyncio.timeout(60):
        async with OutputMerge([stubborn], 0.05) as merge:
            await merge.take()
    assert "1 engine requests did not end" in caplog.text
    release.set()
    await asyncio.sleep(0.01)
