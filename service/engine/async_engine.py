"""Drives an engine from a thread of its own and posts what each step produced to an asyncio loop, once per step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from service.engine.admission import Admission, QueueLimits
from service.engine.backlog import NUM_RECORDS, Backlog, measure, used_share
from service.engine.engine import Engine
from service.engine.errors import EngineDeadError, RequestRejectedError
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.inspection import Inspection, inspect_requests
from service.engine.preparation import Preparation
from service.engine.request import FinishReason, Request, RequestOutput
from service.engine.stats import EngineHealth, EngineInfo, EngineStats

logger = logging.getLogger(__name__)

Listener = Callable[[RequestOutput], None]

_DEAD_MESSAGE = "the engine stopped after an internal error"


class AsyncEngine:
    """An engine for many concurrent callers of one asyncio loop.

    All public methods are called on that loop; the step thread alone touches the engine. Whatever happens (a step
    raises, the engine is closed), every accepted request's listener hears exactly one finished output.
    `on_traced_end` hears on the loop of the end of every request that has a trace context.
    """

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        *,
        stall_timeout_s: float = 60.0,
        replica: str = "0",
        start_up: tuple[tuple[str, float], ...] = (),
        grammars: GrammarCompiler | None = None,
        on_traced_end: Callable[[Request, RequestOutput], None] | None = None,
    ) -> None:
        self.info = info
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        self._replica = replica
        self._start_up = start_up
        self._preparation = Preparation(grammars, on_ready=self._post, on_end=lambda output: self._deliver([output]))
        self._listeners: dict[str, Listener] = {}
        self._on_traced_end = on_traced_end
        self._traced: dict[str, Request] = {}
        self._inbox: deque[Request | str] = deque()
        self._untold: list[RequestOutput] = []
        self._wake = threading.Condition()
        self._is_closing = False
        self._failure: str | None = None
        self._idle_time_s = 0.0
        self._last_progress_s = time.monotonic()
        max_num_running = engine.scheduler.config.max_num_seqs
        limits = QueueLimits(max_num_running, info.max_num_requests - max_num_running, info.max_num_waiting_tokens)
        self._admission = Admission(limits, self._running_requests)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the step thread. Results go to the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> None:
        """Accepts `request`; `listener` hears every output on the loop, the last one finished, exactly once.

        Raises EngineOverloadedError when the queue is full or the key has its share of it, EngineDeadError when the
        engine has stopped and RequestRejectedError when the id is in use or the request could never run here.
        """
        if self._failure or self._is_closing:
            raise EngineDeadError(self._failure or "the engine is shutting down")
        if request.request_id in self._listeners:
            raise RequestRejectedError(f"request id {request.request_id!r} is in use")
        self._engine.validate(request)
        self._preparation.check(request)
        self._admission.accept(request)
        if not self._listeners:
            self._last_progress_s = time.monotonic()
        self._listeners[request.request_id] = listener
        if request.trace_context and self._on_traced_end is not None:
            self._traced[request.request_id] = request
        self._preparation.start(request)

    def abort(self, request_id: str) -> None:
        """Ends a request within a step. Its listener hears `FinishReason.ABORT`; unknown ids are ignored."""
        if request_id in self._listeners and not self._preparation.cancel(request_id):
            self._post(request_id)

    def health(self) -> EngineHealth:
        """Red when a step raised, or when there is work but no step has ended for `stall_timeout_s`."""
        if self._failure:
            return EngineHealth(False, self._failure)
        if self._is_closing or not self._thread.is_alive():
            return EngineHealth(False, "the engine is not running")
        waited_s = time.monotonic() - self._last_progress_s if self._listeners else 0.0
        if waited_s > self._stall_timeout_s:
            return EngineHealth(False, f"no engine step has ended for {waited_s:.0f} s", waited_s)
        return EngineHealth(True, seconds_since_progress=waited_s)

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment."""
        # Copying a deque runs no Python code, so no other thread gets between.
        posted_keys = [message.key_id for message in tuple(self._inbox) if isinstance(message, Request)]
        stats = self._engine.stats(
            self._replica, posted_keys=posted_keys, idle_time_s=self._idle_time_s, start_up=self._start_up
        )
        capacity, backlog = self._engine.meter.capacity, self._backlog()
        return replace(
            stats,
            seconds_per_request=self._admission.seconds_per_request,
            num_queued_tokens=backlog.queued,
            num_running_tokens=backlog.running,
            backlog_s=capacity.seconds_for(backlog.prompt, backlog.generation),
            prompt_tokens_per_s=capacity.prompt_tokens_per_s,
            generation_tokens_per_s=capacity.generation_tokens_per_s,
            work_s=capacity.work_s,
        )

    def _backlog(self) -> Backlog:
        # Copying a list or a deque runs no Python code, so no other thread gets between.
        scheduler = self._engine.scheduler
        computed = {sequence.request_id: sequence.num_computed_tokens for sequence in list(scheduler.running)}
        records = tuple(scheduler.finished)[-NUM_RECORDS:]
        return measure(self._admission.live, computed, used_share(records))

    def inspect(self, seconds: float = 0.0) -> Inspection:
        """Who is in the engine and who holds which block; with what happened in the last `seconds`."""
        scheduler, now_s = self._engine.scheduler, time.monotonic()
        requests, blocks = inspect_requests(scheduler, now_s)
        since_s = now_s - seconds
        return Inspection(
            replica=self._replica,
            now_s=now_s,
            time_s=time.time(),
            requests=requests,
            blocks=blocks,
            steps=self._engine.meter.since(since_s),
            finished=tuple(record for record in tuple(scheduler.finished) if record.ended_s >= since_s),
        )

    async def close(self) -> None:
        """Stops the thread after the step it is in; requests still here end with an error output."""
        self._preparation.close()
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # What the thread has posted comes first.
        self._fail_all("the engine is shutting down")

    def _running_requests(self) -> list[Request]:
        # The list is replaced or changed by another thread; copying it runs no Python code, so nobody gets between.
        return [sequence.request for sequence in list(self._engine.scheduler.running)]

    # From here on: the step thread, and what it posts to the loop.

    def _post(self, message: Request | str) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._untold += self._read_inbox()
                outputs = self._engine.step(self._tell)  # which may put another list in the place of `_untold`
                self._untold += outputs
                self._last_progress_s = time.monotonic()
                if all(output.timing is not None for output in outputs):
                    # Nothing but first tokens and ends, as with few users: they are what somebody waits for.
                    self._tell()
        except Exception:
            logger.exception("engine step failed; the engine stops")
            self._tell()
            self._failure = _DEAD_MESSAGE
            self._call_on_loop(self._fail_all, _DEAD_MESSAGE)

    def _tell(self) -> None:
        """Posts what the loop does not know yet.

        As a rule that is of the step before, just when the network begins to run: the loop's thread then has the
        interpreter to itself, where it would else have to share it with the planning of the step.
        """
        if self._untold:
            outputs, self._untold = self._untold, []
            self._call_on_loop(self._deliver, outputs)

    def _wait_for_work(self) -> bool:
        """Blocks while there is nothing to do. False when the engine is closing."""
        if (self._inbox or self._engine.has_work) and not self._is_closing:
            return True
        self._tell()
        started_s = time.monotonic()
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._is_closing)
        self._idle_time_s += time.monotonic() - started_s
        return not self._is_closing

    def _read_inbox(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self._engine.add_request(message)
            elif output := self._engine.abort(message):
                outputs.append(output)
        return outputs

    def _call_on_loop(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        # The loop may have closed under us at interpreter exit: then nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            if output.is_finished:
                listener = self._listeners.pop(output.request_id, None)
                if listener is not None:
                    self._admission.end(output.request_id)
                    self._preparation.release(output.request_id)
            else:
                listener = self._listeners.get(output.request_id)
            if listener is not None:
                listener(output)
            if output.is_finished and self._traced:
                self._trace(output)

    def _trace(self, output: RequestOutput) -> None:
        request = self._traced.pop(output.request_id, None)
        if request is None or self._on_traced_end is None:
            return
        try:
            self._on_traced_end(request, output)
        except Exception:  # Whoever waits for an answer is not to lose it to an observer.
            logger.exception("tracing request %s failed", output.request_id)

    def _fail_all(self, message: str) -> None:
        self._deliver(
            [
                RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=message, is_engine_failure=True)
                for request_id in list(self._listeners)
            ]
        )
