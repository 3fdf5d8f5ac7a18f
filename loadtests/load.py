"""Puts one load on one server and returns every request's record and the window they were measured in.

The window opens when the first measured request is sent, after the warm-up and without a pause, and closes when the
last measured one is answered. Until then the load is kept up by requests that are not counted, so that no request is
measured on a server that is being left alone.
"""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Protocol

from loadtests.arrivals import poisson_arrivals
from loadtests.plan import LoadPlan
from loadtests.record import Phase, RequestRecord

BACKOFF_S = 0.1
"""A closed-loop user whose request failed waits so long: a server that refuses everything is not hammered."""


class Sender(Protocol):
    """Sends requests by number."""

    async def send(self, index: int, phase: Phase, planned_s: float | None) -> RequestRecord:
        """Always returns a record. `planned_s` is when an open loop meant to send it."""
        ...

    def abandon(self) -> None:
        """Hangs up on every request in flight; their `send` returns with what had come."""
        ...


class WindowWatch(Protocol):
    """Told when the window opens and closes."""

    def open(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """What happened. Times on `perf_counter`; `client_cpu_s` is this process's processor time in the window."""

    plan: LoadPlan
    records: tuple[RequestRecord, ...]
    opened_s: float
    closed_s: float
    client_cpu_s: float

    @property
    def window_s(self) -> float:
        return self.closed_s - self.opened_s

    @property
    def measured(self) -> list[RequestRecord]:
        return [record for record in self.records if record.phase is Phase.MEASURED]


async def run_load(plan: LoadPlan, sender: Sender, watch: WindowWatch, *, seed: int | str = 0) -> Measurement:
    """Runs `plan`. What is unanswered after `plan.max_cell_s` counts as failed ("disconnected", by us)."""
    ledger = _Ledger(plan, sender, watch)
    driver = asyncio.create_task(_open_loop(plan, ledger, seed) if plan.rate else _closed_loop(plan, ledger))
    answered = asyncio.create_task(ledger.answered.wait())
    gc.collect()
    gc.disable()
    try:
        await asyncio.wait({driver, answered}, timeout=plan.max_cell_s, return_when=asyncio.FIRST_COMPLETED)
        ledger.close()
        sender.abandon()
        await driver
    finally:
        gc.enable()
        driver.cancel()
        answered.cancel()
    return ledger.measurement()


async def _closed_loop(plan: LoadPlan, ledger: _Ledger) -> None:
    async with asyncio.TaskGroup() as users:
        for _ in range(plan.concurrency or 1):
            users.create_task(_user(ledger))


async def _user(ledger: _Ledger) -> None:
    while not ledger.is_closed:
        record = await ledger.request()
        if not record.is_success and not ledger.is_closed:
            await asyncio.sleep(BACKOFF_S)


async def _open_loop(plan: LoadPlan, ledger: _Ledger, seed: int | str) -> None:
    started_s = perf_counter()
    in_flight: set[asyncio.Task[RequestRecord]] = set()
    async with asyncio.TaskGroup() as requests:
        for at_s in poisson_arrivals(plan.rate or 1.0, seed):
            await ledger.sleep_until(started_s + at_s)
            if ledger.is_closed:
                return
            if len(in_flight) >= plan.max_in_flight:
                ledger.leave_out(started_s + at_s)
                continue
            task = requests.create_task(ledger.request(started_s + at_s))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)


class _Ledger:
    """Numbers the requests, says what each is for, and knows when the measured ones are all answered."""

    def __init__(self, plan: LoadPlan, sender: Sender, watch: WindowWatch) -> None:
        self._plan = plan
        self._sender = sender
        self._watch = watch
        self._records: list[RequestRecord] = []
        self._num_started = 0
        self._num_unanswered = 0
        self._opened_s: float | None = None
        self._closed_s: float | None = None
        self._cpu_s = 0.0
        self.answered = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        return self._closed_s is not None

    async def request(self, planned_s: float | None = None) -> RequestRecord:
        """Sends the next request and files its record."""
        index, phase = self._next()
        record = await self._sender.send(index, phase, planned_s)
        self._file(record)
        return record

    def leave_out(self, planned_s: float) -> None:
        """Files the next request as failed without sending it: too many are in flight."""
        index, phase = self._next()
        message = f"{self._plan.max_in_flight} requests were in flight"
        self._file(RequestRecord(index, phase, planned_s, 0.0, error="not_sent", message=message))

    async def sleep_until(self, time_s: float) -> None:
        """Returns at `time_s`, or when the window closes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, time_s - perf_counter())):
                await self.answered.wait()

    def close(self) -> None:
        """Closes the window, once. Nothing is measured after."""
        if self.is_closed:
            return
        self._closed_s = perf_counter()
        self._cpu_s = process_time() - self._cpu_s
        if self._opened_s is not None:
            self._watch.close()
        self.answered.set()

    def measurement(self) -> Measurement:
        closed_s = self._closed_s or perf_counter()
        opened_s = closed_s if self._opened_s is None else self._opened_s
        records = tuple(sorted(self._records, key=lambda record: record.index))
        return Measurement(self._plan, records, opened_s, closed_s, self._cpu_s if self._opened_s else 0.0)

    def _next(self) -> tuple[int, Phase]:
        index = self._num_started
        self._num_started += 1
        if index < self._plan.num_warmup:
            return index, Phase.WARMUP
        if self._opened_s is None:
            self._open()
        if not self._measures(index):
            self._close_if_answered()
            return index, Phase.FILLER
        self._num_unanswered += 1
        return index, Phase.MEASURED

    def _open(self) -> None:
        self._watch.open()
        self._cpu_s = process_time()
        self._opened_s = perf_counter()

    def _measures(self, index: int) -> bool:
        if self._plan.num_requests is not None:
            return index < self._plan.num_warmup + self._plan.num_requests
        return self._opened_s is not None and perf_counter() - self._opened_s < (self._plan.duration_s or 0.0)

    def _file(self, record: RequestRecord) -> None:
        self._records.append(record)
        if record.phase is Phase.MEASURED:
            self._num_unanswered -= 1
            self._close_if_answered()

    def _close_if_answered(self) -> None:
        if self._num_unanswered == 0 and not self._measures(self._num_started):
            self.close()
