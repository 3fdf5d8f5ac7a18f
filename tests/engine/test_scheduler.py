from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.engine.bad_words import BadWords
from service.engine.engine import Engine
from service.engine.errors import RequestRejectedError
from service.engine.request import FinishReason, Request, RequestOutput
from tests.engine.scripted import (
    VOCAB_SIZE,
    Clock,
    ScriptedRunner,
    continuation,
    make_engine,
    make_request,
    make_scheduler,
)


def run_to_end(engine: Engine, requests: list[Request]) -> dict[str, list[RequestOutput]]:
    for request in requests:
        engine.add_request(request)
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for _ in range(10_000):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
    raise AssertionError("the engine does not come to an end")


def ids(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def test_one_request_runs_to_its_length() -> None:
    request = make_request("a", ignore_eos=True)
    outputs = run_to_end(make_engine(), [request])["a"]
    assert ids(outputs) == continuation(request)
    assert [output.is_finished for output in outputs] == [False] * 7 + [True]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].timing is not None
    assert outputs[-1].timing.queued_s > 0
    assert outputs[-1].timing.decode_s > 0


def test_of_a_request_without_tokens_only_the_prompt_is_absorbed() -> None:
    [output] = run_to_end(make_engine(), [make_request("a", max_tokens=0)])["a"]
    assert (output.new_token_ids, output.finish_reason) == ((), FinishReason.LENGTH)


def test_a_stop_token_ends_a_request_and_is_reported() -> None:
    alone = ids(run_to_end(make_engine(), [make_request("a", ignore_eos=True)])["a"])
    outputs = run_to_end(make_engine(), [make_request("a", stop_token_ids=(alone[3],), ignore_eos=True)])["a"]
    assert ids(outputs) == alone[:4]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_token_id == alone[3]


def test_min_tokens_outlasts_a_stop_token() -> None:
    alone = ids(run_to_end(make_engine(), [make_request("a", ignore_eos=True)])["a"])
    request = make_request("a", stop_token_ids=(alone[1],), min_tokens=5, ignore_eos=True)
    assert len(ids(run_to_end(make_engine(), [request])["a"])) >= 5


def test_min_tokens_reached_a_stop_token_counts_again() -> None:
    alone = ids(run_to_end(make_engine(), [make_request("a", ignore_eos=True)])["a"])
    request = make_request("a", stop_token_ids=(alone[4],), min_tokens=5, ignore_eos=True)
    assert ids(run_to_end(make_engine(), [request])["a"]) == alone[:5]


def test_a_long_prompt_is_absorbed_in_chunks_beside_decodes() -> None:
    engine = make_engine(make_scheduler(max_num_batched_tokens=4, max_num_seqs=2))
    engine.add_request(make_request("short", max_tokens=10, ignore_eos=True))
    engine.step()
    engine.add_request(make_request("long", tuple(range(12)), max_tokens=4, ignore_eos=True))
    sizes = []
    while len(engine.scheduler.running) < 2 or engine.scheduler.running[1].num_output_tokens == 0:
        decoded = engine.step()
        assert [output.request_id for output in decoded][:1] == ["short"], "a long prompt must not stall a decode"
        sizes.append(engine.scheduler.running[1].num_computed_tokens)
    assert sizes == [3, 6, 9, 12]


def test_preemption_loses_nothing_and_the_oldest_wins() -> None:
    requests = [make_request(f"r{i}", (i + 1, 2, 3), max_tokens=20, ignore_eos=True) for i in range(4)]
    engine = make_engine(make_scheduler(num_blocks=8))
    outputs = run_to_end(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    assert {name: ids(out) for name, out in outputs.items()} == {r.request_id: continuation(r) for r in requests}


def test_a_resumed_request_continues_where_it_was() -> None:
    whole = make_request("a", max_tokens=10, ignore_eos=True)
    expected = continuation(whole)
    rest = make_request("a", max_tokens=10, ignore_eos=True, output_token_ids=tuple(expected[:4]))
    assert ids(run_to_end(make_engine(), [rest])["a"]) == expected[4:]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request("a", ()), "no tokens"),
        (make_request("a", (1,) * 30, max_tokens=3), "30 tokens and max_tokens is 3.*limit of 32"),
        (make_request("a", max_tokens=2, output_token_ids=(1, 2)), "nothing is left"),
        (make_request("a", max_tokens=0, output_token_ids=(1,)), "nothing is left"),
        (make_request("a", max_tokens=1, output_token_ids=(1, 2)), "nothing is left"),
        (make_request("a", max_tokens=4, output_token_ids=(1, 1000)), "token ids"),
        (make_request("a", (1, VOCAB_SIZE)), "0..49"),
        (make_request("a", (1, -1)), "0..49"),
        (make_request("a", stop_token_ids=(VOCAB_SIZE,)), "0..49"),
        (make_request("a", logprob_token_ids=(VOCAB_SIZE,)), "0..49"),
        (make_request("a", bad_words=BadWords(((0, VOCAB_SIZE, -1),), 1)), "0..49"),
    ],
)
def test_what_could_never_run_is_refused(request_: Request, words: str) -> None:
    with pytest.raises(RequestRejectedError, match=words):
        make_scheduler().add(request_)


def test_a_pool_that_cannot_hold_one_full_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold one sequence"):
        make_scheduler(num_blocks=7)


def test_abort_frees_memory_at_once_wherever_the_request_is() -> None:
    engine = make_engine(make_scheduler(max_num_seqs=1))
    for name in ("runs", "waits"):
        engine.add_request(make_request(name))
    engine.step()
    for name in ("waits", "runs"):
        output = engine.abort(name)
        assert output is not None
        assert output.finish_reason is FinishReason.ABORT
        engine.scheduler.check_integrity()
    assert engine.abort("runs") is None
    assert not engine.has_work
    assert engine.scheduler.blocks.num_free_blocks == 16


def test_a_deadline_ends_a_request_wherever_it_is_and_frees_its_memory() -> None:
    clock = Clock()
    engine = make_engine(make_scheduler(max_num_seqs=1, clock=clock))
    engine.add_request(replace(make_request("runs", ignore_eos=True), timeout_s=5))
    engine.add_request(replace(make_request("waits"), timeout_s=6))
    engine.add_request(make_request("has time"))
    before = [*engine.step(), *engine.step()]
    clock.now_s = 5.5
    [late, *_] = engine.step()
    assert (late.request_id, late.finish_reason, late.new_token_ids) == ("runs", FinishReason.DEADLINE, ())
    assert late.timing is not None
    assert late.timing.decode_s > 5
    assert ids(before) == continuation(make_request("runs", ignore_eos=True))[:2]
    engine.scheduler.check_integrity()
    clock.now_s = 7
    [late, *_] = engine.step()
    assert (late.request_id, late.finish_reason) == ("waits", FinishReason.DEADLINE)
    clock.now_s = 1e9
    while engine.has_work:
        assert [output.request_id for output in engine.step()] == ["has time"]
    assert engine.scheduler.blocks.num_free_blocks == 16


def test_a_deadline_in_the_queue_ends_what_never_ran() -> None:
    clock = Clock()
    engine = make_engine(make_scheduler(clock=clock))
    engine.add_request(replace(make_request("late"), timeout_s=0))
    [output] = engine.step()
    assert (output.request_id, output.finish_reason, output.new_token_ids) == ("late", FinishReason.DEADLINE, ())
    assert not engine.has_work


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20), st.integers(1, 12)),
        min_size=1,
        max_size=8,
    ),
    num_blocks=st.integers(8, 20),
    block_size=st.sampled_from([4, 5, 31]),
    max_num_seqs=st.integers(1, 5),
    extra_budget=st.integers(0, 20),
)
def test_every_schedule_gives_every_request_its_own_text(
    prompts: list[tuple[list[int], int]], num_blocks: int, block_size: int, max_num_seqs: int, extra_budget: int
) -> None:
    requests = [make_request(f"r{i}", tuple(p), max_tokens=m) for i, (p, m) in enumerate(prompts)]
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_budget,
    )
    engine = make_engine(scheduler)
    outputs = run_to_end(engine, requests)
    assert {name: ids(out) for name, out in outputs.items()} == {r.request_id: continuation(r) for r in requests}
    assert all(sum(o.is_finished for o in out) == 1 and out[-1].is_finished for out in outputs.values())
    assert scheduler.blocks.num_free_blocks == num_blocks
    assert isinstance(engine.runner, ScriptedRunner)
    assert engine.runner.max_tokens_seen <= scheduler.config.max_num_batched_tokens


class RandomTraffic(RuleBasedStateMachine):
    """Requests come, go and are aborted at any moment; invariants hold after every step."""

    @initialize(
        num_blocks=st.integers(8, 12),
        max_num_seqs=st.integers(1, 4),
        extra=st.integers(0, 8),
        window=st.none() | st.integers(1, 11),
        spare_short_blocks=st.integers(0, 6),
        num_swap_blocks=st.sampled_from([0, 1, 5, 20]),
    )
    def start(
        self,
        num_blocks: int,
        max_num_seqs: int,
        extra: int,
        window: int | None,
        spare_short_blocks: int,
        num_swap_blocks: int,
    ) -> None:
        self.engine = make_engine(
            make_scheduler(
                num_blocks=num_blocks,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_seqs + extra,
                window=window,
                spare_short_blocks=spare_short_blocks,
                num_swap_blocks=num_swap_blocks,
            )
        )
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}

    @rule(
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
        max_tokens=st.integers(1, 8),
        done=st.integers(0, 3),
        timeout_s=st.none() | st.floats(0, 2e-4),
        whose=st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.integers(-1, 1)),
        begins_like=st.none() | st.tuples(st.integers(0, 5), st.integers(1, 24)),
        salt=st.sampled_from(["", "", "x"]),
        num_prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        done: int,
        timeout_s: float | None,
        whose: tuple[str, int, int],
        begins_like: tuple[int, int] | None,
        salt: str,
        num_prompt_logprobs: int | None,
    ) -> None:
        name = f"r{len(self.requests)}"
        if begins_like and self.requests:
            # Like an earlier text, its continuation included; like all of it when the rest is empty.
            index, length = begins_like
            earlier = self.requests[f"r{max(len(self.requests) - 1 - index, 0)}"]
            text = [*earlier.prompt_token_ids, *continuation(earlier)]
            prompt = (text[:length] + prompt[: length % 3])[:24]
        request = make_request(name, tuple(prompt), max_tokens, num_prompt_logprobs=num_prompt_logprobs)
        resumed = continuation(request)[: min(done, max_tokens - 1)]
        # An ended text is not resumed: the gateway has its terminal answer.
        if resumed and resumed[-1] == 0:
            resumed = []
        key, weight, priority = whose
        request = replace(
            request, output_token_ids=tuple(resumed), timeout_s=timeout_s, key_id=key, weight=weight, priority=priority
        )
        self.engine.add_request(replace(request, cache_salt=salt))
        self.requests[name], self.outputs[name] = request, []

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if output := self.engine.abort(name):
            self.outputs[name].append(output)

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for output in self.engine.step():
                self.outputs[output.request_id].append(output)
            self.engine.scheduler.check_integrity()

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        for name, request in self.requests.items():
            outputs = self.outputs[name]
            assert [o.is_finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
            expected = continuation(request)
            if outputs[-1].finish_reason in (FinishReason.ABORT, FinishReason.DEADLINE):
                expected = expected[: len(ids(outputs))]
            assert ids(outputs) == expected


TestRandomTraffic = RandomTraffic.TestCase
TestRandomTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
