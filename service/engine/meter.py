"""What an engine's steps did: counters since it started, distributions, and the latest steps one by one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from itertools import compress, takewhile
from operator import gt, not_, sub
from typing import NamedTuple

from service.engine.capacity import Capacity
from service.engine.distribution import Tally

STEP_SECONDS = (
    *(0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
BATCH_SIZES = tuple(float(2**power) for power in range(11))
STEP_TOKENS = tuple(float(2**power) for power in range(15))

# So many steps are booked in one go: a loop over many takes a fraction of what as many single calls take, between which
# the network has emptied the processor's caches.
_MAX_UNBOOKED = 256
# A few seconds of the fastest steps, a few minutes of slow ones; about 2 MB.
_MAX_STEPS = 8192


class StepRecord(NamedTuple):
    """One step. Times are seconds on the engine's clock; counts are of its plan, of what was left after it, and of the
    tokens that came of it.
    """

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
    num_generated_tokens: int


# The fields of a StepRecord. A plain tuple of numbers is made in no time, and the garbage collector leaves it alone.
Step = tuple[float, float, float, float, int, int, int, int, int, int, int]


class StepMeter:
    """Counts for one engine. Its thread records; any thread may `book`, and then read."""

    def __init__(self) -> None:
        self._unbooked: deque[Step] = deque()
        self._booking = threading.Lock()
        self._steps: deque[Step] = deque(maxlen=_MAX_STEPS)
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

    def record(self, step: Step) -> None:
        """Notes one step."""
        self._unbooked.append(step)
        if len(self._unbooked) >= _MAX_UNBOOKED:
            self.book()

    def book(self) -> None:
        """Brings all counts up to the last step. To be called before they are read."""
        with self._booking:
            # The engine's thread may add more meanwhile.
            steps = [self._unbooked.popleft() for _ in range(len(self._unbooked))]
            if steps:
                self._book(steps)

    def _book(self, steps: Sequence[Step]) -> None:
        self._steps.extend(steps)
        columns = zip(*steps, strict=True)
        started_s, planned_s, executed_s, ended_s, num_seqs, num_tokens, num_prompt_tokens, *_, num_generated = columns
        took_s = list(map(sub, ended_s, started_s))
        self.num_steps += len(steps)
        self.num_prompt_tokens += sum(num_prompt_tokens)
        self.num_generated_tokens += sum(num_generated)
        self.step_time_s += sum(took_s)
        self.forward_time_s += sum(map(sub, executed_s, planned_s))
        for step in zip(num_tokens, num_prompt_tokens, took_s, strict=True):
            self.capacity.record(*step)
        # A step that absorbs a prompt makes all who decode in it wait: the two kinds answer different questions.
        kinds = list(map(gt, num_tokens, num_seqs))
        self.prefill_steps_s.observe_all(compress(took_s, kinds))
        self.decode_steps_s.observe_all(compress(took_s, map(not_, kinds)))
        self.batch_sizes.observe_all(num_seqs)
        self.step_tokens.observe_all(num_tokens)

    def since(self, at_s: float) -> tuple[StepRecord, ...]:
        """The latest steps that ended at `at_s` or later, oldest first."""
        self.book()
        latest = takewhile(lambda step: step[3] >= at_s, reversed(tuple(self._steps)))
        return tuple(StepRecord(*step) for step in latest)[::-1]
