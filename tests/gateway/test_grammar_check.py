"""Grammars that would take the server with them: they take a process that is there for it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import pytest

from model.tokenizer import Tokenizer
from service.engine.grammar import Grammar, GrammarKind
from service.gateway.errors import ApiError, BadRequestError
from service.gateway.grammar_check import GrammarChecker
from service.gateway.grammar_fields import AskedGrammar

# Rules that lead to one another overflow the stack; the intersection of these never ends to be computed; and this many
# states are too many.
CRASHES = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + '\nr3000: "x"'
HANGS = "start: A\nA: " + " & ".join(f"/(.{{{p}}})*/" for p in (7, 11, 13, 17, 19, 23, 29, 31))
EXPLODES = "((a{1,1000}){1,1000}){1,1000}"


def asked(kind: GrammarKind, source: str) -> AskedGrammar:
    return AskedGrammar("guided_regex", Grammar(kind, source))


GOOD = asked(GrammarKind.REGEX, "[a-z]+")


@pytest.fixture
def checker(tokenizer: Tokenizer) -> GrammarChecker:
    return GrammarChecker(lambda: [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)])


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
    assert "too long" in await hanging
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
