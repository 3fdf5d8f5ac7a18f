"""Steps that are booked many at a time, against the same steps counted one by one."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.capacity import Capacity
from service.engine.distribution import Tally
from service.engine.meter import BATCH_SIZES, STEP_SECONDS, STEP_TOKENS, Step, StepMeter, StepRecord


def steps_in_order(seed: int, num_steps: int) -> list[Step]:
    source, steps = random.Random(seed), list[Step]()
    now_s = source.uniform(0, 1000)
    for _ in range(num_steps):
        started_s, planned_s, executed_s, now_s = accumulate(source.choices((0.0, 0.0005, 0.01), k=3), initial=now_s)
        num_seqs, num_generated = source.randint(1, 20), source.randint(0, 20)
        num_tokens = num_seqs + max(source.randint(-20, 20), 0)
        counts = (num_seqs, num_tokens, source.randint(0, num_tokens), 1, 2, 3, num_generated)
        steps.append((started_s, planned_s, executed_s, now_s, *counts))
    return steps


SEEDS, LENGTHS = st.integers(0, 2**32), st.sampled_from([0, 1, 40, 300, 700])


@given(SEEDS, LENGTHS, st.integers(1, 500))
def test_many_steps_at_once_count_as_one_by_one(seed: int, num_steps: int, period: int) -> None:
    steps, meter, capacity = steps_in_order(seed, num_steps), StepMeter(), Capacity()
    durations_s = {True: Tally(STEP_SECONDS), False: Tally(STEP_SECONDS)}
    batch_sizes, step_tokens = Tally(BATCH_SIZES), Tally(STEP_TOKENS)
    for number, step in enumerate(steps):
        meter.record(step)
        if number % period == 0:
            meter.book()
        record = StepRecord(*step)
        took_s = record.ended_s - record.started_s
        capacity.record(record.num_tokens, record.num_prompt_tokens, took_s)
        durations_s[record.num_tokens > record.num_seqs].observe(took_s)
        batch_sizes.observe(record.num_seqs)
        step_tokens.observe(record.num_tokens)
    records = meter.since(0.0)
    assert records == tuple(StepRecord(*step) for step in steps)
    assert meter.num_steps == len(steps)
    assert meter.num_prompt_tokens == sum(record.num_prompt_tokens for record in records)
    assert meter.num_generated_tokens == sum(record.num_generated_tokens for record in records)
    assert meter.step_time_s == pytest.approx(sum(record.ended_s - record.started_s for record in records))
    assert meter.forward_time_s == pytest.approx(sum(record.executed_s - record.planned_s for record in records))
    assert meter.prefill_steps_s.snapshot() == durations_s[True].snapshot()
    assert meter.decode_steps_s.snapshot() == durations_s[False].snapshot()
    assert meter.batch_sizes.snapshot() == batch_sizes.snapshot()
    assert meter.step_tokens.snapshot() == step_tokens.snapshot()
    assert (meter.capacity.work_s, meter.capacity.prompt_tokens_per_s) == (
        capacity.work_s,
        capacity.prompt_tokens_per_s,
    )


@given(SEEDS, LENGTHS, st.integers(0, 700))
def test_the_latest_steps_are_those_that_ended_since(seed: int, num_steps: int, number: int) -> None:
    steps, meter = steps_in_order(seed, num_steps), StepMeter()
    for step in steps:
        meter.record(step)
    at_s = steps[min(number, len(steps) - 1)][3] if steps else 0.0
    assert meter.since(at_s) == tuple(StepRecord(*step) for step in steps if step[3] >= at_s)
