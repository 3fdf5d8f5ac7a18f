"""The engine: one synchronous, deterministic step at a time. Every scheduling bug reproduces in a loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from service.engine.meter import StepMeter
from service.engine.request import Request, RequestOutput
from service.engine.scheduler import Scheduler
from service.engine.stats import EngineStats
from service.engine.step import SchedulerOutput, StepOutput


class Runner(Protocol):
    """Executes a plan. Calls `on_start` once, when all is prepared and the network is about to run."""

    def execute(self, plan: SchedulerOutput, on_start: Callable[[], None] = lambda: None) -> StepOutput: ...


class Engine:
    """A scheduler and a runner. Not thread-safe: one thread calls it."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.meter = StepMeter()
        self.num_aborted = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def validate(self, request: Request) -> None:
        """Raises RequestRejectedError when `request` could never run here. Any thread may ask."""
        self.scheduler.validate(request)

    def add_request(self, request: Request) -> None:
        """Queues `request`. Raises RequestRejectedError when it could never run here."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once; None when it is not here (any more)."""
        output = self.scheduler.abort(request_id)
        self.num_aborted += output is not None
        return output

    def step(self, on_start: Callable[[], None] = lambda: None) -> list[RequestOutput]:
        """Plans, executes and books one step. A request's last output `is_finished`.

        Calls `on_start` once, when the network is about to run or there is nothing to run it for: a good moment for
        other threads.
        """
        scheduler = self.scheduler
        started_s = time.monotonic()
        expired = scheduler.expire()
        plan = scheduler.schedule()
        if not plan.scheduled:
            on_start()
            return expired
        planned_s = time.monotonic()
        result = self.runner.execute(plan, on_start)
        executed_s = time.monotonic()
        outputs = scheduler.update_from_output(plan, result)
        self._record((started_s, planned_s, executed_s), plan, outputs)
        return expired + outputs

    def _record(
        self, times_s: tuple[float, float, float], plan: SchedulerOutput, outputs: Sequence[RequestOutput]
    ) -> None:
        """Tells the meter of a step, in numbers: a plan that had to wait until it is booked would have left the
        processor's caches by then.
        """
        scheduler = self.scheduler
        self.meter.record(
            (
                *times_s,
                time.monotonic(),
                len(plan.scheduled),
                plan.num_tokens,
                plan.num_prompt_tokens,
                len(scheduler.running),
                len(scheduler.waiting),
                scheduler.blocks.num_free_blocks,
                sum([len(output.new_token_ids) for output in outputs]),
            )
        )

    def stats(
        self,
        replica: str,
        *,
        posted_keys: Sequence[str] = (),
        idle_time_s: float = 0.0,
        start_up: tuple[tuple[str, float], ...] = (),
    ) -> EngineStats:
        """A snapshot; exact between steps, within one step of the truth from another thread.

        `posted_keys` are those of requests on their way to this engine: they wait, too.
        """
        scheduler, blocks, meter = self.scheduler, self.scheduler.blocks, self.meter
        meter.book()
        cache = blocks.prefix_cache
        return EngineStats(
            replica=replica,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(posted_keys),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_slots=blocks.num_slots,
            num_free_slots=blocks.num_free_slots,
            num_steps=meter.num_steps,
            num_prompt_tokens=meter.num_prompt_tokens,
            num_generated_tokens=meter.num_generated_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_resumptions=scheduler.num_resumptions,
            num_aborted=self.num_aborted,
            num_idle_blocks=cache.num_idle_blocks,
            num_cached_blocks=cache.num_cached_blocks,
            num_snapshots=cache.num_snapshots,
            num_queried_tokens=cache.num_queried_tokens,
            num_hit_tokens=cache.num_hit_tokens,
            num_evictions=cache.num_evictions,
            num_swapped_blocks=blocks.swap_pool.num_blocks,
            num_swap_outs=blocks.swap_pool.num_outs,
            num_swap_ins=blocks.swap_pool.num_ins,
            step_time_s=meter.step_time_s,
            forward_time_s=meter.forward_time_s,
            idle_time_s=idle_time_s,
            start_up=start_up,
            by_key=self._by_key(posted_keys),
            decode_steps_s=meter.decode_steps_s.snapshot(),
            prefill_steps_s=meter.prefill_steps_s.snapshot(),
            batch_sizes=meter.batch_sizes.snapshot(),
            step_tokens=meter.step_tokens.snapshot(),
        )

    def _by_key(self, posted_keys: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
        # Copying a list runs no Python code, so that the stepping thread cannot get between.
        running = Counter(sequence.request.key_id for sequence in list(self.scheduler.running))
        live = Counter({account.key_id: account.num_live for account in self.scheduler.waiting.accounts})
        live.update(posted_keys)
        return tuple((key, running[key], max(live[key] - running[key], 0)) for key in live if key and live[key])
