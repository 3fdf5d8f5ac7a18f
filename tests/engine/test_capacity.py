"""What an engine can do, from its steps, and what it still has to do, from its requests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.backlog import measure, used_share
from service.engine.capacity import Capacity
from service.engine.record import RequestRecord
from tests.engine.scripted import make_engine, make_request, make_scheduler


def decode(capacity: Capacity, num_seqs: int, seconds: float, num_steps: int = 20) -> None:
    for _ in range(num_steps):
        capacity.record(num_seqs, 0, seconds)


def test_nothing_is_known_before_there_were_steps() -> None:
    capacity = Capacity()
    assert (capacity.prompt_tokens_per_s, capacity.seconds_for(100, 100)) == (0.0, 0.0)
    capacity.record(1, 0, 0.5)
    assert capacity.generation_tokens_per_s == 0.0
    assert capacity.work_s == 0.5


def test_it_is_what_the_best_batches_come_to_whatever_runs_now() -> None:
    capacity = Capacity()
    decode(capacity, 1, 0.001)
    assert capacity.generation_tokens_per_s == pytest.approx(1000)
    decode(capacity, 32, 0.010)
    decode(capacity, 1, 0.001, num_steps=500)
    assert capacity.generation_tokens_per_s == pytest.approx(3200)
    before = capacity.work_s
    decode(capacity, 1, 0.001, num_steps=1000)  # a second of one stream
    assert capacity.work_s - before == pytest.approx(1000 / 3200)


def test_prompts_have_a_rate_of_their_own() -> None:
    capacity = Capacity()
    decode(capacity, 8, 0.008)
    assert capacity.prompt_tokens_per_s == pytest.approx(1000)
    for _ in range(20):
        capacity.record(512, 500, 0.128)
    assert capacity.prompt_tokens_per_s == pytest.approx(4000)
    assert capacity.generation_tokens_per_s == pytest.approx(1000)
    assert capacity.seconds_for(4000, 2000) == pytest.approx(3)


def test_it_follows_a_machine_that_became_slower() -> None:
    capacity = Capacity()
    decode(capacity, 8, 0.004, num_steps=200)
    decode(capacity, 8, 0.008, num_steps=1000)
    assert capacity.generation_tokens_per_s == pytest.approx(1000, rel=0.01)


def record(max_tokens: int, num_output_tokens: int) -> RequestRecord:
    return RequestRecord("r", "stop", 1, num_output_tokens, max_tokens, 0, 0.0, None, None, 0.0)


def test_completions_count_as_long_as_they_lately_were() -> None:
    assert used_share([]) == 1.0
    assert used_share([record(100, 20), record(300, 80)]) == 0.25
    request = make_request("r", (1,) * 10, 400)
    assert measure([request], {}, 0.25).queued == 10 + 100
    assert measure([request], {"r": 4}, 0.25).running == 6 + 100
    assert measure([request], {"r": 30}, 0.25).running == 80
    assert measure([request], {"r": 300}, 0.25).running == 1, "longer than expected, and not ended"


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12),
    num_steps=st.integers(0, 30),
)
def test_what_is_left_is_what_the_engine_then_computes(lengths: list[tuple[int, int]], num_steps: int) -> None:
    engine = make_engine(make_scheduler(num_blocks=200, max_model_len=128, has_prefix_cache=False))
    requests = [
        make_request(f"r{n}", (1 + n,) * prompt, most, ignore_eos=True) for n, (prompt, most) in enumerate(lengths)
    ]
    live = {request.request_id: request for request in requests}
    for request in requests:
        engine.add_request(request)

    def step() -> None:
        for output in engine.step():
            if output.is_finished:
                del live[output.request_id]

    for _ in range(num_steps):
        step()

    def num_tokens() -> int:
        stats = engine.stats("0")
        return stats.num_prompt_tokens + stats.num_generated_tokens

    computed = {s.request_id: s.num_computed_tokens for s in engine.scheduler.running}
    left = measure(live.values(), computed, 1.0)
    before = num_tokens()
    while engine.has_work:
        step()
    done = num_tokens() - before
    # The last token of each completion is sampled, and not absorbed; what was sampled before may still be to absorb.
    assert abs(left.queued + left.running - done) <= len(requests)


def test_tokens_brought_along_are_absorbed_not_generated() -> None:
    request = replace(make_request("r", (1,) * 5, 20), output_token_ids=(1,) * 8)
    backlog = measure([request], {}, 1.0)
    assert (backlog.prompt, backlog.generation) == (13, 12)
