"""One choice: ids in, text out, the right count and the right reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from service.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from service.gateway.choice import Choice, Delta
from service.gateway.errors import GenerationFailedError
from service.gateway.stops import StopSet
from tests.gateway.server import MODEL_DIR

TOKENIZER = Tokenizer.load(MODEL_DIR)
assert TOKENIZER is not None
ALPHABET = "ab é€🦊\n"


def make_choice(*stops: str, **sampling: object) -> Choice:
    params = SamplingParams(max_tokens=100, **sampling)  # type: ignore[arg-type]
    return Choice(0, Request("r", (1,), params), TOKENIZER, StopSet(stops) if stops else None)


def play(choice: Choice, outputs: list[RequestOutput]) -> str:
    """Feeds until the choice has finished; all its text."""
    text = ""
    for output in outputs:
        choice.feed(output)
        delta = choice.take()
        text += delta.text if delta else ""
        if choice.is_finished:
            assert choice.take() is not None, "a finished choice says so whenever asked"
            break
    return text


def one_by_one(ids: list[int], *, reason: FinishReason = FinishReason.LENGTH) -> list[RequestOutput]:
    outputs = [RequestOutput("r", (token_id,)) for token_id in ids[:-1]]
    return [*outputs, RequestOutput("r", (ids[-1],), reason)]


@given(text=st.text(alphabet=ALPHABET, min_size=1, max_size=30), cuts=st.lists(st.integers(1, 5), max_size=20))
def test_text_is_exact_however_outputs_are_cut(text: str, cuts: list[int]) -> None:
    ids = TOKENIZER.encode(text)
    outputs, start = [], 0
    for cut in cuts:
        outputs.append(RequestOutput("r", tuple(ids[start : start + cut])))
        start += cut
    outputs.append(RequestOutput("r", tuple(ids[start:]), FinishReason.LENGTH))
    choice = make_choice()
    assert play(choice, outputs) == text
    assert choice.num_tokens == len(ids)


@given(
    text=st.text(alphabet=ALPHABET, min_size=1, max_size=30), stop=st.text(alphabet=ALPHABET, min_size=1, max_size=3)
)
def test_a_stop_string_ends_the_text_and_the_count_at_the_token_that_completed_it(text: str, stop: str) -> None:
    ids = TOKENIZER.encode(text)
    choice = make_choice(stop)
    seen = play(choice, one_by_one(ids))
    before, found, _ = text.partition(stop)
    assert seen == before
    assert choice.stop_reason == (stop if found else None)
    assert choice.finish_reason == (FinishReason.STOP if found else FinishReason.LENGTH)
    needed = next((n for n in range(len(ids) + 1) if stop in TOKENIZER.decode(ids[:n])), len(ids))
    assert choice.num_tokens == needed


def test_half_a_character_is_never_shown_and_an_unfinished_one_becomes_a_replacement_at_the_end() -> None:
    ids = TOKENIZER.encode("🦊")
    assert len(ids) > 1
    choice = make_choice()
    choice.feed(RequestOutput("r", tuple(ids[:-1])))
    assert choice.take() is None
    choice.feed(RequestOutput("r", (), FinishReason.LENGTH))
    delta = choice.take()
    assert delta is not None
    assert delta.text == "�"


def test_a_partial_stop_string_comes_out_when_the_engine_ends_first() -> None:
    choice = make_choice("fine stop")
    assert play(choice, one_by_one(TOKENIZER.encode("I am fine st"))) == "I am fine st"
    assert choice.finish_reason is FinishReason.LENGTH


def test_the_stop_string_wins_over_the_length_when_one_token_reaches_both() -> None:
    choice = make_choice("end")
    assert play(choice, one_by_one(TOKENIZER.encode("the end"))) == "the "
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, "end")


@pytest.mark.parametrize(("asked", "reason"), [((), None), ((7,), 7)])
@pytest.mark.parametrize("stops", [(), ("zzz",)])
def test_a_stop_token_is_counted_but_not_shown(
    asked: tuple[int, ...], reason: int | None, stops: tuple[str, ...]
) -> None:
    hello = TOKENIZER.encode("hello")
    choice = make_choice(*stops, stop_token_ids=asked)
    end = RequestOutput("r", (7,), FinishReason.STOP, stop_token_id=7)
    assert play(choice, [RequestOutput("r", tuple(hello)), end]) == "hello"
    assert choice.num_tokens == len(hello) + 1
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, reason)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    ids = TOKENIZER.encode("one. two. three.")
    dots = [n for n in range(1, len(ids) + 1) if TOKENIZER.decode(ids[:n]).endswith(".")]
    choice = make_choice(".", min_tokens=dots[0] + 1)
    assert play(choice, one_by_one(ids)) == "one. two"
    assert choice.num_tokens == dots[1]
    choice = make_choice(".", min_tokens=dots[0])
    assert play(choice, one_by_one(ids)) == "one"


def test_without_a_tokenizer_ids_come_instead_of_text() -> None:
    choice = Choice(3, Request("r", (1,), SamplingParams(max_tokens=9)), None, None)
    choice.feed(RequestOutput("r", (4, 5)))
    choice.feed(RequestOutput("r", (0,), FinishReason.STOP, stop_token_id=0))
    assert choice.take() == Delta(3, "", (4, 5, 0), FinishReason.STOP, None)


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_a_failure_of_the_engine_is_raised(reason: FinishReason) -> None:
    with pytest.raises(GenerationFailedError):
        make_choice().feed(RequestOutput("r", (), reason, error="secret"))
