"""An engine behind a Ray Serve replica. Knows how gateways reach it there; not how it is deployed, nor HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Set
from typing import Protocol

from ray import serve

from service.autoscaling import UseMeter
from service.config import EngineConfig
from service.engine.errors import EngineDeadError, EngineError
from service.engine.inspection import Inspection
from service.engine.request import FinishReason, Request, RequestOutput
from service.engine.stats import EngineHealth, EngineInfo, EngineStats
from service.garbage import freeze
from service.mailbox import Mailbox
from service.ray_autoscaling import report
from service.ray_router import CACHE_TOKENS
from service.wire import Hello, Item, Pulse, StreamError, Verdict

ENGINE = "Engine"
PULSE_PERIOD_S = 1.0


class ServedEngine(Protocol):
    """What a replica needs of an engine; see `AsyncEngine`."""

    info: EngineInfo

    def start(self) -> None: ...
    def submit(self, request: Request, listener: Callable[[RequestOutput], None]) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def health(self) -> EngineHealth: ...
    def stats(self) -> EngineStats: ...
    def inspect(self, seconds: float = 0.0) -> Inspection: ...


LoadEngine = Callable[[EngineConfig, str], ServedEngine]
"""Loads an engine, blocking; the second argument is the replica's name."""


def load_engine(config: EngineConfig, replica: str) -> ServedEngine:
    """The engine of this project. Its thread count is set before torch reads the one Ray has chosen."""
    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    from service.startup import start_engine

    return start_engine(config, replica=replica)


class _Gateway:
    """One gateway's stream and the requests that feed it, each with the event of its end."""

    def __init__(self, pulse: Callable[[], Pulse]) -> None:
        self.mailbox = Mailbox()
        self.requests: dict[str, asyncio.Event] = {}
        self._pulse = pulse

    def put(self, output: RequestOutput) -> None:
        """Hands on what came of a request; its call ends with its last output."""
        self.mailbox.put(output)
        if output.finish_reason is not None and (ended := self.requests.pop(output.request_id, None)):
            ended.set()
        if output.finish_reason is FinishReason.ERROR:
            # The engine is likely dead: the gateway should know that before it sends the next request.
            self.mailbox.beat(self._pulse())

    def fail(self, reason: str) -> None:
        """Ends every request and then the stream."""
        for request_id in list(self.requests):
            failure = RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=reason, is_engine_failure=True)
            self.put(failure)
        self.mailbox.close()


class _LogForwarder(logging.Handler):
    """Hands on, from any thread to a function on the event loop, what this project's code warns of."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self._loop = asyncio.get_running_loop()
        self.addFilter(lambda record: record.name.startswith(("service.", "model.")))

    def emit(self, record: logging.LogRecord) -> None:
        self._loop.call_soon_threadsafe(self._say, self.format(record))


class EngineReplica:
    """One engine, reached by any number of gateways.

    A gateway opens one stream and sends its requests; what every step produces for any of them comes back as one
    message of that stream. A request's own call lasts as long as the request does, so that Serve counts, drains and
    cancels requests; a gateway whose stream ends takes its requests with it.
    """

    async def __init__(self, config: EngineConfig, load: LoadEngine = load_engine) -> None:  # type: ignore[misc]
        self._name = serve.get_replica_context().replica_id.unique_id
        self._gateways: dict[str, _Gateway] = {}
        self._failure = ""
        self._use = UseMeter()
        self._block_size = config.block_size if config.prefix_cache else 0
        self._engine = await asyncio.to_thread(load, config, self._name)
        self._engine.start()
        freeze()
        self._pulse_task = asyncio.create_task(self._beat())
        logging.getLogger().addHandler(_LogForwarder(self._log))

    async def open(
        self,
        gateway_id: str,
        request: Request | None = None,
        *,
        system_fingerprint: str = "",
        avoid: Set[str] = frozenset(),  # noqa: ARG002
    ) -> AsyncGenerator[Item, None]:
        """Without a request: the stream of that gateway. With one: generates it, into that stream.

        Where `system_fingerprint` is another than this engine's, the request is refused: what is known of its text
        would not go on here as it has begun. `avoid` is for the router alone: see `EngineRouter`.
        """
        if request is None:
            return self._stream(gateway_id)
        return self._generate(gateway_id, request, system_fingerprint)

    def record_routing_stats(self) -> dict[str, int]:
        """For routers: how many tokens this engine's memory can hold for prompts to come."""
        return {CACHE_TOKENS: self._engine.stats().num_blocks * self._block_size}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's controller, which decides how many replicas there are; asked by Serve about once a second."""
        stats = self._engine.stats()
        return report(stats, self._use.share(stats.work_s, time.monotonic()))

    async def stats(self) -> EngineStats:
        """Counters and gauges of this moment."""
        return self._engine.stats()

    async def inspect(self, seconds: float) -> Inspection:
        """A look into the engine, with what happened in the last `seconds`."""
        return self._engine.inspect(seconds)

    async def check_health(self) -> None:
        """Raises when the engine is dead or stuck: Serve then replaces this replica.

        There is no way back, so everybody who waits gets an answer now.
        """
        health = self._engine.health()
        if not health.is_healthy and not self._failure:
            self._failure = health.reason
            for gateway in self._gateways.values():
                gateway.fail(health.reason)
        if self._failure:
            raise RuntimeError(self._failure)

    async def _stream(self, gateway_id: str) -> AsyncGenerator[Item, None]:
        if self._failure:
            yield Verdict(self._name, EngineDeadError(self._failure))
            return
        if gateway_id in self._gateways:
            yield Verdict(self._name, StreamError("the gateway has a stream from this replica"))
            return
        gateway = self._gateways[gateway_id] = _Gateway(self._pulse)
        mailbox = gateway.mailbox
        try:
            yield Hello(self._name, self._engine.info, self._pulse())
            while not mailbox.is_closed:
                yield await mailbox.take()
        finally:
            del self._gateways[gateway_id]
            # A copy: what waits for its grammar ends at once, and takes itself out.
            for request_id, ended in list(gateway.requests.items()):
                self._engine.abort(request_id)
                ended.set()

    async def _generate(self, gateway_id: str, request: Request, system_fingerprint: str) -> AsyncGenerator[Item, None]:
        request_id, own = request.request_id, self._engine.info.system_fingerprint
        try:
            if system_fingerprint not in ("", own):
                raise EngineDeadError(f"the request began on {system_fingerprint}, and this engine is {own}")
            gateway = self._accept(gateway_id, request)
        except EngineError as error:
            yield Verdict(self._name, error)
            return
        ended = gateway.requests[request_id]
        try:
            yield Verdict(self._name, system_fingerprint=own)
            await ended.wait()
        finally:
            if not ended.is_set():
                del gateway.requests[request_id]
                self._engine.abort(request_id)

    def _accept(self, gateway_id: str, request: Request) -> _Gateway:
        """Submits `request`. Raises EngineError."""
        if self._failure:
            raise EngineDeadError(self._failure)
        gateway = self._gateways.get(gateway_id)
        if gateway is None:
            raise StreamError("the gateway has no stream from this replica")
        self._engine.submit(request, gateway.put)
        gateway.requests[request.request_id] = asyncio.Event()
        return gateway

    def _log(self, line: str) -> None:
        for gateway in self._gateways.values():
            gateway.mailbox.log(line)

    def _pulse(self) -> Pulse:
        return Pulse(self._engine.health(), self._engine.stats())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(PULSE_PERIOD_S)
            pulse = self._pulse()
            for gateway in self._gateways.values():
                gateway.mailbox.beat(pulse)
