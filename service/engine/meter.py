"""What an engine's steps did: counters since it started, distributions, and the latest steps one by one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from service.engine.capacity import Capacity
from service.engine.distribution import Tally
from service.engine.request import RequestOutput
from service.engine.step import SchedulerOutput

STEP_SECONDS = (
    *(0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
BATCH_SIZES = tuple(float(2**power) for power in range(11))
STEP_TOKENS = tuple(float(2**power) for power in range(15))

# So many steps are booked in one go: a loop over many takes a fraction of what as many single calls take, between which
# the network has emptied the processor's caches.
_MAX_UNBOOKED = 64
# A few seconds of the fastest steps, a few minutes of slow ones; about 2 MB.
_MAX_STEPS = 8192


class StepRecord(NamedTuple):
    """One step. Times are seconds on the engine's clock; counts are of its plan, and of what was left after it."""

    started_s: float
    planned_s: float
    executed_s: float
    ended_s: float
    num_seqs: int
    num_tokens: int
    num_prompt_tokens: int
    num_running: int
    num_waiting: int
    num_free_blocks: int


_Unbooked = tuple[SchedulerOutput, Sequence[RequestOutput], tuple[float, float, float, float], tuple[int, int, int]]


class StepMeter:
    """Counts for one engine. Its thread records; any thread may `book`, and then read."""

    def __init__(self) -> None:
        self._unbooked: deque[_Unbooked] = deque()
        self._booking = threading.Lock()
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.step_time_s = 0.0
        self.forward_time_s = 0.0
        self.capacity = Capacity()
        self.decode_steps_s = Tally(STEP_SECONDS)
        self.prefill_steps_s = Tally(STEP_SECONDS)
        self.batch_sizes = Tally(BATCH_SIZES)
        self.step_tokens = Tally(STEP_TOKENS)
        self.steps: deque[StepRecord] = deque(maxlen=_MAX_STEPS)

    def record(
        self,
        plan: SchedulerOutput,
        outputs: Sequence[RequestOutput],
        times_s: tuple[float, float, float, float],
        left: tuple[int, int, int],
    ) -> None:
        """Notes one step and what came of it; `times_s` and `left` are the first and the last of a `StepRecord`."""
        self._unbooked.append((plan, outputs, times_s, left))
        if len(self._unbooked) >= _MAX_UNBOOKED:
            self.book()

    def book(self) -> None:
        """Brings all counts up to the last step. To be called before they are read."""
        with self._booking:
            while self._unbooked:
                plan, outputs, times_s, left = self._unbooked.popleft()
                counts = len(plan.scheduled), plan.num_tokens, _num_prompt_tokens(plan)
                self._book(StepRecord(*times_s, *counts, *left), outputs)

    def _book(self, step: StepRecord, outputs: Sequence[RequestOutput]) -> None:
        took_s = step.ended_s - step.started_s
        self.num_steps += 1
        self.num_prompt_tokens += step.num_prompt_tokens
        self.num_generated_tokens += sum([len(output.new_token_ids) for output in outputs])
        self.step_time_s += took_s
        self.forward_time_s += step.executed_s - step.planned_s
        self.capacity.record(step.num_tokens, step.num_prompt_tokens, took_s)
        # A step that absorbs a prompt makes all who decode in it wait: the two kinds answer different questions.
        (self.prefill_steps_s if step.num_tokens > step.num_seqs else self.decode_steps_s).observe(took_s)
        self.batch_sizes.observe(step.num_seqs)
        self.step_tokens.observe(step.num_tokens)
        self.steps.append(step)


def _num_prompt_tokens(plan: SchedulerOutput) -> int:
    """How many of the plan's tokens are of prompts."""
    return sum(
        [
            min(item.num_tokens, num_prompt - item.start)
            for item in plan.scheduled
            if item.start < (num_prompt := item.sequence.num_prompt_tokens)
        ]
    )
