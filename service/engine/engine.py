"""The engine: one synchronous, deterministic step at a time. Every scheduling bug reproduces in a loop."""

from __future__ import annotations

import time
from collections import Counter
from typing import Protocol

from service.engine.request import Request, RequestOutput
from service.engine.scheduler import Scheduler, SchedulerOutput, StepOutput
from service.engine.stats import EngineStats


class Runner(Protocol):
    """Executes a plan."""

    def execute(self, plan: SchedulerOutput) -> StepOutput: ...


class Engine:
    """A scheduler and a runner. Not thread-safe: one thread calls it."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_aborted = 0
        self.step_time_s = 0.0
        self.forward_time_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def validate(self, request: Request) -> None:
        """Raises RequestRejectedError when `request` could never run here. Any thread may ask."""
        self.scheduler.validate(request)

    def add_request(self, request: Request) -> None:
        """Queues `request`. Raises RequestRejectedError when it could never run here."""
        self.scheduler.add(request)
        self.num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once; None when it is not here (any more)."""
        output = self.scheduler.abort(request_id)
        self.num_aborted += output is not None
        return output

    def step(self) -> list[RequestOutput]:
        """Plans, executes and books one step. A request's last output `is_finished`."""
        started_s = time.perf_counter()
        expired = self.scheduler.expire()
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return expired
        planned_s = time.perf_counter()
        result = self.runner.execute(plan)
        executed_s = time.perf_counter()
        outputs = self.scheduler.update_from_output(plan, result)
        self.num_steps += 1
        self.num_generated_tokens += sum(len(output.new_token_ids) for output in outputs)
        self.forward_time_s += executed_s - planned_s
        self.step_time_s += time.perf_counter() - started_s
        return expired + outputs

    def stats(self, replica: str, *, idle_time_s: float = 0.0, start_up_s: float = 0.0) -> EngineStats:
        """A snapshot; exact between steps, within one step of the truth from another thread."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return EngineStats(
            replica=replica,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_slots=blocks.num_slots,
            num_free_slots=blocks.num_free_slots,
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_aborted=self.num_aborted,
            step_time_s=self.step_time_s,
            forward_time_s=self.forward_time_s,
            idle_time_s=idle_time_s,
            start_up_s=start_up_s,
            by_key=self._by_key(),
        )

    def _by_key(self) -> tuple[tuple[str, int, int], ...]:
        # Copying a list runs no Python code, so that the stepping thread cannot get between.
        running = Counter(sequence.request.key_id for sequence in list(self.scheduler.running))
        accounts = [account for account in self.scheduler.waiting.accounts if account.key_id and account.num_live]
        return tuple((a.key_id, running[a.key_id], max(a.num_live - running[a.key_id], 0)) for a in accounts)
