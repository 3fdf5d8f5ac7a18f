"""However often and wherever engines are lost, the reader of a request gets what one engine would have given."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from service.delivery import MAX_LOSSES, MAX_LOSSES_IN_PLACE, Delivery
from service.engine.request import FinishReason, Request, RequestOutput, RequestTiming, TokenLogprob
from tests.engine.scripted import Clock, continuation, make_engine, make_request, make_scheduler


def run(request: Request, num_steps: int) -> list[RequestOutput]:
    """What an engine of its own gives for `request` in at most so many steps."""
    engine = make_engine(make_scheduler(num_blocks=32, max_model_len=64))
    engine.validate(request)
    engine.add_request(request)
    return [output for _ in range(num_steps) for output in engine.step()]


def ids_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=20),
    max_tokens=st.integers(1, 20),
    is_eos_ignored=st.booleans(),
    min_tokens=st.integers(0, 5),
    lives=st.lists(st.integers(0, 6), max_size=6),
)
def test_losses_change_nothing_for_the_reader(
    prompt: list[int], max_tokens: int, is_eos_ignored: bool, min_tokens: int, lives: list[int]
) -> None:
    request = make_request(
        "a", tuple(prompt), max_tokens, ignore_eos=is_eos_ignored, min_tokens=min(min_tokens, max_tokens)
    )
    delivery, seen = Delivery(request), list[RequestOutput]()
    ids = set()
    for num_steps in [*lives, 100]:
        ids.add(request_id := delivery.next_id())
        delivery.accepted(f"replica of {request_id}", "same")
        sent = delivery.rest(request_id)
        assert len(sent.output_token_ids) == len(ids_of(seen))
        seen += [delivery.book(output) for output in run(sent, num_steps)]
        if seen and seen[-1].is_finished:
            break
        if not delivery.lose():
            seen.append(delivery.end(FinishReason.ERROR, "lost"))
            break
    assert len(ids) == delivery.num_losses + (seen[-1].finish_reason is not FinishReason.ERROR)
    assert {output.request_id for output in seen} == {"a"}
    assert [output.is_finished for output in seen] == [False] * (len(seen) - 1) + [True]
    whole = continuation(request)
    assert ids_of(seen) == whole[: len(ids_of(seen))]
    if seen[-1].finish_reason is not FinishReason.ERROR:
        (alone,) = [output for output in run(request, 100) if output.is_finished]
        assert ids_of(seen) == whole
        assert (seen[-1].finish_reason, seen[-1].stop_token_id) == (alone.finish_reason, alone.stop_token_id)
        assert sum(output.num_resumptions for output in seen) == delivery.num_losses
        assert [output.timing is not None for output in seen] == [i in (0, len(seen) - 1) for i in range(len(seen))]


def test_what_the_first_output_told_is_told_once() -> None:
    score = TokenLogprob(3, -1.0, 1)
    request = make_request("a", max_tokens=5, num_prompt_logprobs=0, num_logprobs=0)
    delivery = Delivery(request)
    first = RequestOutput("a", (4,), prompt_logprobs=(score,), logprobs=(score,), num_cached_tokens=2)
    assert delivery.system_fingerprint == ""
    delivery.accepted("one", "f")
    assert delivery.rest(delivery.next_id()) == request
    assert delivery.book(first) == first._replace(system_fingerprint="f")
    assert delivery.system_fingerprint == "f"
    assert delivery.lose()
    assert delivery.lost_replicas == {"one"}
    rest = delivery.rest(delivery.next_id())
    assert (rest.output_token_ids, rest.is_resumed) == ((4,), True)
    assert rest.sampling == replace(request.sampling, num_prompt_logprobs=None)
    delivery.accepted("two", "f")
    again = RequestOutput(rest.request_id, (5,), logprobs=(score,), num_cached_tokens=32)
    assert delivery.book(again) == RequestOutput("a", (5,), logprobs=(score,), num_resumptions=1)


def test_a_prompt_that_was_not_told_of_yet_is_asked_about_again() -> None:
    request = make_request("a", max_tokens=5, num_prompt_logprobs=0)
    delivery = Delivery(request)
    delivery.accepted("one", "f")
    assert delivery.lose()
    assert delivery.system_fingerprint == ""
    assert delivery.rest("a~2") == replace(request, request_id="a~2", is_resumed=True)


def test_a_deadline_goes_on_counting_and_times_add_up() -> None:
    clock = Clock()
    delivery = Delivery(replace(make_request("a"), timeout_s=10.0), clock)
    clock.now_s += 4
    delivery.lose()
    rest = delivery.rest("a~2")
    assert rest.timeout_s is not None
    assert 5.9 < rest.timeout_s < 6.1
    first = delivery.book(RequestOutput("a~2", (1,), timing=RequestTiming(1.0, 2.0, 0.0))).timing
    assert first is not None
    assert (round(first.queued_s, 3), first.prefill_s) == (5.0, 2.0)
    delivery.lose()
    clock.now_s += 3
    last = RequestOutput("a~3", (2,), FinishReason.LENGTH, timing=RequestTiming(0.5, 0.5, 0.5))
    timing = delivery.book(last).timing
    assert timing is not None
    assert (timing.queued_s, timing.prefill_s, round(timing.decode_s, 3)) == (first.queued_s, 2.0, 3.0)
    clock.now_s += 30
    assert delivery.time_left_s == 0


def test_a_request_that_brings_engines_down_is_given_up() -> None:
    stuck = Delivery(make_request("a", max_tokens=100))
    assert [stuck.lose() for _ in range(MAX_LOSSES_IN_PLACE)] == [True] * (MAX_LOSSES_IN_PLACE - 1) + [False]
    accused = Delivery(make_request("a", max_tokens=100))
    assert accused.lose()
    accused.accuse()
    assert not accused.lose()
    unlucky = Delivery(make_request("a", max_tokens=100))
    answers = []
    for _ in range(MAX_LOSSES):
        unlucky.book(RequestOutput("a", (1,)))
        answers.append(unlucky.lose())
    assert answers == [True] * (MAX_LOSSES - 1) + [False]
