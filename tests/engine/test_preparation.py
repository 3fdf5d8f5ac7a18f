"""Requests with a grammar on their way into the engine: the others do not wait for them, and each gets one answer."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from service.engine.async_engine import AsyncEngine
from service.engine.errors import RequestRejectedError
from service.engine.grammar import Grammar, GrammarKind
from service.engine.grammar_compiler import GrammarCompiler, Matcher
from service.engine.local_client import LocalEngineClient
from service.engine.preparation import Preparation
from service.engine.request import FinishReason, Request, RequestOutput
from tests.engine.scripted import make_engine, make_request
from tests.engine.test_async_engine import INFO


class SlowCompiler(GrammarCompiler):
    """Compiles when it is let."""

    def __init__(self) -> None:
        super().__init__(lambda: [b"a", b"b"], max_kept=1)
        self.may_go = threading.Event()

    def matcher(self, grammar: Grammar) -> Matcher:
        assert self.may_go.wait(60)
        return super().matcher(grammar)


def held(request_id: str, pattern: str = "a+") -> Request:
    request = make_request(request_id)
    grammar = Grammar(GrammarKind.REGEX, pattern)
    return replace(request, sampling=replace(request.sampling, grammar=grammar))


async def answers(engine: AsyncEngine, request: Request) -> list[RequestOutput]:
    return [output async for output in LocalEngineClient(engine).generate(request)]


@pytest.fixture
def compiler() -> SlowCompiler:
    return SlowCompiler()


@pytest.fixture
async def engine(compiler: SlowCompiler):  # type: ignore[no-untyped-def]
    engine = AsyncEngine(make_engine(), INFO, grammars=compiler)
    engine.start()
    yield engine
    compiler.may_go.set()
    await engine.close()
    assert not compiler._num_holders, "whoever has ended holds nothing"


async def test_others_go_on_while_a_grammar_is_compiled(engine: AsyncEngine, compiler: SlowCompiler) -> None:
    waiting = [asyncio.create_task(answers(engine, held(f"h{i}"))) for i in range(2)]
    await asyncio.sleep(0)
    assert (await answers(engine, make_request("free")))[-1].finish_reason is not FinishReason.ERROR
    assert not any(task.done() for task in waiting)
    compiler.may_go.set()
    for outputs in await asyncio.gather(*waiting):
        assert outputs[-1].finish_reason is not FinishReason.ERROR
    compiler.may_go.clear()
    assert (await answers(engine, held("again")))[-1].is_finished, "what is compiled is not waited for"


async def test_a_grammar_stays_ready_until_its_request_ends(compiler: SlowCompiler) -> None:
    compiler.may_go.set()
    ready: asyncio.Queue[Request] = asyncio.Queue()
    preparation = Preparation(compiler, ready.put_nowait, on_end=lambda _: None)
    requests = [held(f"h{i}", f"a{{{i}}}b") for i in range(1, 4)]
    for request in requests:
        preparation.start(request)
        assert await asyncio.wait_for(ready.get(), 60) is request

    def num_ready() -> int:
        return sum(compiler.is_ready(grammar) for request in requests if (grammar := request.sampling.grammar))

    assert num_ready() == 3
    for request in requests:
        preparation.release(request.request_id)
    assert num_ready() == 1, "one is kept that nobody holds"
    preparation.close()


async def test_a_request_can_be_given_up_while_its_grammar_is_compiled(
    engine: AsyncEngine, compiler: SlowCompiler
) -> None:
    heard: list[RequestOutput] = []
    engine.submit(held("a"), heard.append)
    engine.abort("a")
    assert [output.finish_reason for output in heard] == [FinishReason.ABORT]
    compiler.may_go.set()
    assert (await answers(engine, held("b")))[-1].is_finished
    assert len(heard) == 1
    assert engine.stats().num_prompt_tokens == 3


async def test_a_deadline_counts_while_a_grammar_is_compiled(engine: AsyncEngine, compiler: SlowCompiler) -> None:
    heard: list[RequestOutput] = []
    engine.submit(replace(held("late"), timeout_s=0.01), heard.append)
    engine.submit(replace(held("in time", "b+"), timeout_s=60), heard.append)
    while not heard:
        await asyncio.sleep(0.005)
    assert [(output.request_id, output.finish_reason) for output in heard] == [("late", FinishReason.DEADLINE)]
    compiler.may_go.set()
    while not heard[-1].is_finished or len(heard) == 1:
        await asyncio.sleep(0.005)
    assert {output.request_id for output in heard[1:]} == {"in time"}
    assert heard[-1].finish_reason is not FinishReason.DEADLINE


async def test_closing_answers_who_waits_for_a_grammar(engine: AsyncEngine) -> None:
    heard: list[RequestOutput] = []
    engine.submit(held("a"), heard.append)
    await engine.close()
    assert [output.finish_reason for output in heard] == [FinishReason.ERROR]


async def test_a_failing_step_leaves_nobody_waiting_for_a_grammar(compiler: SlowCompiler) -> None:
    def fail() -> None:
        raise ValueError

    engine = AsyncEngine(make_engine(on_step=fail), INFO, grammars=compiler)
    engine.start()
    heard: list[RequestOutput] = []
    engine.submit(held("a"), heard.append)
    await answers(engine, make_request("b"))
    assert [output.finish_reason for output in heard] == [FinishReason.ERROR]
    assert not engine._preparation._waiting
    compiler.may_go.set()
    await asyncio.sleep(0.05)
    assert not engine._inbox, "what is compiled now is nobody's"
    await engine.close()


async def test_a_grammar_that_is_no_good_ends_its_request(engine: AsyncEngine, compiler: SlowCompiler) -> None:
    compiler.may_go.set()
    [output] = await answers(engine, held("a", "("))
    assert output.finish_reason is FinishReason.ERROR
    assert "unclosed group" in (output.error or "")


async def test_without_a_tokenizer_there_are_no_grammars() -> None:
    engine = AsyncEngine(make_engine(), INFO)
    engine.start()
    with pytest.raises(RequestRejectedError, match="no tokenizer"):
        await answers(engine, held("a"))
    await engine.close()
