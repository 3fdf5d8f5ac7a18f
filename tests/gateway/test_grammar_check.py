"""Grammars that would take the server with them: they take a process that is there for it."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.tokenizer import Tokenizer
from service.engine.grammar import Grammar, GrammarKind
from service.gateway import grammar_check
from service.gateway.app import create_app
from service.gateway.errors import ApiError, BadRequestError
from service.gateway.grammar_check import GrammarChecker
from service.gateway.grammar_fields import AskedGrammar
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.server import served_model

# Rules that lead to one another overflow the stack; the intersection of these never ends to be computed; and this many
# states are too many.
CRASHES = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + '\nr3000: "x"'
HANGS = "start: A\nA: " + " & ".join(f"/(.{{{p}}})*/" for p in (7, 11, 13, 17, 19, 23, 29, 31))
EXPLODES = "((a{1,1000}){1,1000}){1,1000}"


def asked(kind: GrammarKind, source: str) -> AskedGrammar:
    return AskedGrammar("guided_regex", Grammar(kind, source))


GOOD = asked(GrammarKind.REGEX, "[a-z]+")


@pytest.fixture
def checker(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GrammarChecker]:
    # However busy the machine, the worker runs into its own limits first: they count its own time.
    monkeypatch.setattr(grammar_check, "_TIMEOUT_S", 300.0)
    checker = GrammarChecker(lambda: [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)])
    yield checker
    checker.close()


async def fault(checker: GrammarChecker, asked: AskedGrammar) -> str:
    with pytest.raises(BadRequestError) as caught:
        await checker.check(asked)
    assert (caught.value.param, caught.value.code) == ("guided_regex", "invalid_grammar")
    return caught.value.message


async def test_a_grammar_that_kills_the_worker_is_refused_and_the_next_one_is_checked(checker: GrammarChecker) -> None:
    await checker.check(GOOD)
    assert "nested too deeply" in await fault(checker, asked(GrammarKind.CONTEXT_FREE, CRASHES))
    assert "too many expressions" in await fault(checker, asked(GrammarKind.REGEX, EXPLODES))
    await checker.check(asked(GrammarKind.REGEX, "[a-z]*"))


async def test_a_grammar_that_would_take_for_ever_is_given_up(checker: GrammarChecker) -> None:
    hanging = asyncio.create_task(fault(checker, asked(GrammarKind.CONTEXT_FREE, HANGS)))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(checker.check(GOOD))
    # Which limit it runs into first depends on the machine.
    assert "it takes too" in await hanging
    await waiting


async def test_nobody_who_goes_away_confuses_the_next_one(checker: GrammarChecker) -> None:
    await checker.check(GOOD)
    leaving = asyncio.create_task(checker.check(asked(GrammarKind.REGEX, "(")))
    await asyncio.sleep(0)
    leaving.cancel()
    await checker.check(asked(GrammarKind.REGEX, "[b-z]+"))
    assert "unclosed" in await fault(checker, asked(GrammarKind.REGEX, "("))


async def test_what_was_found_out_is_remembered(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    await checker.check(GOOD)
    first = await fault(checker, asked(GrammarKind.REGEX, "("))

    def ask_again(_: Grammar) -> Callable[[], str]:
        raise AssertionError("asked again")

    monkeypatch.setattr(checker, "_ask", ask_again)
    await checker.check(GOOD)
    assert await fault(checker, asked(GrammarKind.REGEX, "(")) == first


async def test_a_worker_that_does_not_work_is_no_fault_of_a_grammar(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RuntimeError, match="ended with code 1"):
            await checker.check(GOOD)
    await checker.check(GOOD)


async def test_not_too_many_wait(checker: GrammarChecker) -> None:
    answers = await asyncio.gather(
        *(checker.check(asked(GrammarKind.REGEX, f"a{{{n}}}")) for n in range(1, 40)), return_exceptions=True
    )
    refused = [answer for answer in answers if answer is not None]
    assert len(refused) == 7
    for answer in refused:
        assert isinstance(answer, ApiError)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    await checker.check(asked(GrammarKind.REGEX, "a{39}"))


async def test_one_grammar_sent_often_at_once_is_checked_once(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[Grammar] = []
    ask = checker._ask
    monkeypatch.setattr(checker, "_ask", lambda grammar: (asked_for.append(grammar), ask(grammar))[1])
    first, *others = [asyncio.create_task(checker.check(GOOD)) for _ in range(40)]
    await asyncio.sleep(0)
    first.cancel()
    assert await asyncio.gather(*others) == [None] * 39
    assert first.cancelled()
    assert asked_for == [GOOD.grammar]


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
async def test_what_the_machine_did_to_the_worker_is_no_verdict(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    await checker.check(GOOD)
    assert checker._worker is not None
    other = asked(GrammarKind.REGEX, "[b-z]+")
    with monkeypatch.context() as patch:
        patch.setattr(grammar_check, "_TIMEOUT_S", 0.1)
        checker._worker._process.send_signal(signal.Signals[name])
        with pytest.raises(ApiError) as caught:
            await checker.check(other)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "1")
    await checker.check(other)


async def test_checks_and_the_threads_of_the_loop_do_not_wait_for_each_other(checker: GrammarChecker) -> None:
    may_go = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    busy = asyncio.create_task(asyncio.to_thread(may_go.wait))
    await asyncio.sleep(0)
    try:
        await asyncio.wait_for(checker.check(GOOD), 300)
        assert not busy.done()
    finally:
        may_go.set()
        await busy


async def test_closing_ends_the_worker_whatever_it_does(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await checker.check(GOOD)
    assert checker._worker is not None
    process = checker._worker._process
    has_begun, ask = threading.Event(), checker._ask
    monkeypatch.setattr(checker, "_ask", lambda grammar: (has_begun.set(), ask(grammar))[1])
    hanging = asyncio.create_task(checker.check(asked(GrammarKind.CONTEXT_FREE, HANGS)))
    assert await asyncio.to_thread(has_begun.wait, 60)
    checker.close()
    with pytest.raises(ApiError, match="in time"):
        await hanging
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="shutdown"):
        await checker.check(asked(GrammarKind.REGEX, "[b-z]+"))


async def test_when_the_application_ends_its_checks_do(tokenizer: Tokenizer) -> None:
    app = create_app(FakeEngine(), served_model(tokenizer=tokenizer))
    async with app.router.lifespan_context(app):
        await app.state.gateway.grammars.check(GOOD)
    with pytest.raises(RuntimeError, match="shutdown"):
        await app.state.gateway.grammars.check(asked(GrammarKind.REGEX, "[b-z]+"))
