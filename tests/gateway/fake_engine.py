"""An engine client whose every answer is written down beforehand. Shares no code with the real engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from service.engine.inspection import Inspection
from service.engine.request import FinishReason, Request, RequestOutput, RequestTiming
from service.engine.stats import EngineHealth, EngineInfo, EngineStats, Fleet

Script = Callable[[Request], AsyncGenerator[RequestOutput, None]]

INFO = EngineInfo(
    model_dir="/nowhere",
    vocab_size=4096,
    max_model_len=512,
    eos_token_id=0,
    dtype="float32",
    memory_dtype="float32",
    device="cpu",
    kernel_path="fake",
    fingerprint="0123456789abcdef",
    num_parameters=1,
    max_num_requests=1000,
)
TIMING = RequestTiming(queued_s=0.001, prefill_s=0.002, decode_s=0.003)


def say(token_ids: Iterable[int], *, finish: FinishReason = FinishReason.LENGTH, delay_s: float = 0.0) -> Script:
    """One token a step, up to the request's own limit; `finish` STOP means that the last one is a stop token."""
    ids = tuple(token_ids)

    async def script(request: Request) -> AsyncGenerator[RequestOutput, None]:
        last = min(len(ids), request.sampling.max_tokens) - 1
        for position, token_id in enumerate(ids[: last + 1]):
            await asyncio.sleep(delay_s)
            reason = finish if position == last else None
            stop = token_id if reason is FinishReason.STOP else None
            timing = TIMING if reason else None
            yield RequestOutput(request.request_id, (token_id,), reason, stop, timing=timing)

    return script


def steps(*outputs: Sequence[int] | FinishReason | Exception) -> Script:
    """One output for each list of ids, then an end: a reason, or an exception to raise."""

    async def script(request: Request) -> AsyncGenerator[RequestOutput, None]:
        for output in outputs:
            await asyncio.sleep(0)
            if isinstance(output, Exception):
                raise output
            if isinstance(output, FinishReason):
                error = "Traceback: secret.py" if output is FinishReason.ERROR else None
                yield RequestOutput(request.request_id, (), output, error=error)
            else:
                yield RequestOutput(request.request_id, tuple(output))

    return script


def hang(*before: Sequence[int], delay_s: float = 0.0) -> Script:
    """Some outputs, each after `delay_s`, then silence for ever."""

    async def script(request: Request) -> AsyncGenerator[RequestOutput, None]:
        for ids in before:
            await asyncio.sleep(delay_s)
            yield RequestOutput(request.request_id, tuple(ids))
        await asyncio.Event().wait()

    return script


def chatter(*ids: int) -> Script:
    """The same output every millisecond, for ever."""

    async def script(request: Request) -> AsyncGenerator[RequestOutput, None]:
        while True:
            await asyncio.sleep(0.001)
            yield RequestOutput(request.request_id, ids)

    return script


def by_choice(scripts: Sequence[Script]) -> Script:
    """The script of a request is chosen by its last number, the index of the choice in the answer."""

    def script(request: Request) -> AsyncGenerator[RequestOutput, None]:
        return scripts[int(request.request_id.rsplit(":", 1)[1])](request)

    return script


class FakeEngine:
    """Plays `script` for every request and remembers what became of it."""

    def __init__(self, script: Script | None = None, info: EngineInfo = INFO) -> None:
        self.engine_info = info
        self.reset(script)

    def reset(self, script: Script | None = None) -> None:
        """Forgets everything; from now on `script` is played."""
        self.script = script or say([1])
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.health_report: EngineHealth | Exception | None = EngineHealth(True, seconds_since_progress=0.5)
        self.fleet_report: Fleet | None = Fleet(1, 1)
        self.inspections: Sequence[Inspection] = []
        self.snapshots: Sequence[EngineStats] | Exception = [EngineStats("0", num_blocks=8, num_free_blocks=6)]

    async def info(self) -> EngineInfo:
        return self.engine_info

    async def deliver(self, request: Request, listener: Callable[[RequestOutput], None]) -> None:
        self.requests.append(request)
        self.running.add(request.request_id)
        is_over = False
        try:
            async with contextlib.aclosing(self.script(request)) as outputs:
                async for output in outputs:
                    is_over = output.is_finished
                    listener(output)
        except Exception:
            is_over = True
            raise
        finally:
            self.running.discard(request.request_id)
            if not is_over:
                self.aborted.append(request.request_id)

    async def health(self) -> EngineHealth:
        if self.health_report is None:
            await asyncio.Event().wait()
        if isinstance(self.health_report, Exception):
            raise self.health_report
        assert self.health_report is not None
        return self.health_report

    async def stats(self, *, max_age_s: float = 0.0) -> Sequence[EngineStats]:
        if isinstance(self.snapshots, Exception):
            raise self.snapshots
        return self.snapshots

    def fleet(self) -> Fleet | None:
        return self.fleet_report

    async def inspect(self, seconds: float = 0.0) -> Sequence[Inspection]:
        return self.inspections

    async def close(self) -> None:
        self.running.clear()
