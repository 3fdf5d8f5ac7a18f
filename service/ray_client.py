"""The engine client over Ray Serve: every request goes to a replica, and on at another one where that is lost.

Knows how replicas are asked; who is there is known to `Links`. Not how a cluster is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from service.delivery import Delivery
from service.engine.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    FatalRequestError,
    RequestRejectedError,
)
from service.engine.inspection import Inspection
from service.engine.request import FinishReason, Request, RequestOutput
from service.engine.stats import EngineHealth, EngineInfo, EngineStats, Fleet
from service.flight import EngineLostError, Flight, Flights
from service.ray_broadcast import ask_all
from service.ray_engine import PULSE_PERIOD_S, EngineReplica
from service.ray_link import Call, Timeouts, cancel, first_line
from service.ray_links import LOST, Links, SilentError
from service.wire import StreamError, Verdict

logger = logging.getLogger(__name__)

# A request that was lost begins anew while no other such request does, so that one that kills its replica is found out:
# for as long as this without an output, and once another has waited as long as that, it is not alone any more.
_TRIAL_S = 0.5
_LONGEST_WAIT_FOR_TRIAL_S = 2.0
_LAST_OUTPUT_TIMEOUT_S = 5.0
_PULSE_TIMEOUT_S = PULSE_PERIOD_S + 0.25
_PULSE_POLL_S = 0.02
# Of one request: a refusal by each of a few replicas, and streams to be opened first.
_MAX_ATTEMPTS = 10
_CLOSING = "the server is shutting down"
# Between two tries to find a replica for a request that lost its own: twice as long each time.
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Passage:
    """A request under way at a replica that has accepted it."""

    flight: Flight
    call: Call


class RayEngineClient:
    """Implements the gateway's `EngineClient` over the replicas of one deployment.

    All methods are called on the event loop that `connect` ran on. Replicas may come and go at any time. A request
    whose replica is lost goes on at another that gives the same bytes, if one takes it in time. `tokenizer` is the
    digest of the gateway's: see `Links`.
    """

    def __init__(
        self, deployment: DeploymentHandle[EngineReplica], timeouts: Timeouts, tokenizer: str | None = None
    ) -> None:
        self._timeouts = timeouts
        self._flights = Flights()
        self._links = Links(deployment, self._flights, timeouts, tokenizer)
        self._trial = asyncio.Lock()

    @classmethod
    async def connect(
        cls,
        deployment: DeploymentHandle[EngineReplica],
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - frozen
        tokenizer: str | None = None,
    ) -> RayEngineClient:
        """A client with a stream from every replica there is. Raises EngineError when none answers in time."""
        client = cls(deployment, timeouts, tokenizer)
        try:
            await client._links.start()
        except BaseException:
            await client.close()
            raise
        return client

    async def info(self) -> EngineInfo:
        """See `EngineClient.info`."""
        assert self._links.info is not None
        return self._links.info

    async def deliver(self, request: Request, listener: Callable[[RequestOutput], None]) -> None:
        """See `EngineClient.deliver`."""
        async with contextlib.aclosing(self.generate(request)) as outputs:
            async for output in outputs:
                listener(output)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs, for a reader with a pace of its own. Leaving early, in any way, aborts the request."""
        if request.request_id in self._flights:
            raise RequestRejectedError(f"request id {request.request_id!r} is in use")
        delivery = Delivery(request)
        while True:
            try:
                async with asyncio.timeout(delivery.time_left_s):
                    passage = await self._place(delivery)
            except TimeoutError:
                yield delivery.end(FinishReason.DEADLINE)
                return
            except EngineError as error:
                if not delivery.has_output:
                    raise
                yield delivery.end(FinishReason.ERROR, str(error))
                return
            try:
                while True:
                    output = delivery.book(await passage.flight.take())
                    yield output
                    if output.is_finished:
                        return
            except EngineLostError as loss:
                if delivery.lose() and self._timeouts.resume_s and not self._links.is_closed:
                    continue
                if not delivery.has_output:
                    if delivery.is_culprit:
                        raise FatalRequestError from loss
                    raise
                reason = FatalRequestError.MESSAGE if delivery.is_culprit else str(loss)
                yield delivery.end(FinishReason.ERROR, reason)
                return
            finally:
                self._leave(passage)

    async def health(self) -> EngineHealth:
        """Green while any replica is."""
        return self._links.health()

    async def stats(self, *, max_age_s: float = 0.0) -> Sequence[EngineStats]:
        """See `EngineClient.stats`. A replica that takes no more requests is not asked: its next pulse counts.

        One that is silent is left out: what it said before would take back what another gateway has told since.
        """
        if max_age_s >= PULSE_PERIOD_S:
            return [link.pulse.stats for link in self._links.by_replica.values()]
        asked_at_s, told = time.monotonic(), dict[str, EngineStats]()
        with contextlib.suppress(Exception):
            told, _ = await self._links.ask_stats()
        others = [link for link in self._links.by_replica.values() if link.replica not in told]
        while any(link.pulse_at_s < asked_at_s for link in others if link.replica in self._links.by_replica):
            if time.monotonic() > asked_at_s + _PULSE_TIMEOUT_S:
                break
            await asyncio.sleep(_PULSE_POLL_S)
        return [*told.values(), *(link.pulse.stats for link in others if link.pulse_at_s >= asked_at_s)]

    def fleet(self) -> Fleet | None:
        """See `EngineClient.fleet`: at most a few seconds old."""
        return self._links.watch.fleet

    async def inspect(self, seconds: float = 0.0) -> Sequence[Inspection]:
        """See `EngineClient.inspect`. A replica that does not answer within a second is left out."""
        try:
            return (await ask_all(self._links.handle, "inspect", seconds)).told
        except DeploymentUnavailableError:  # as after scaling to none
            return ()

    async def close(self) -> None:
        """Ends every request of this gateway, and every stream."""
        self._links.is_closed = True
        self._flights.lose(_CLOSING)
        await self._links.close()

    async def _place(self, delivery: Delivery) -> _Passage:
        """Gets what is left of a request accepted: at once, or, after a loss, within a time. Raises EngineError."""
        if not delivery.num_losses:
            return await self._send(delivery)
        try:
            async with asyncio.timeout(self._timeouts.resume_s):
                passage = await self._send_patiently(delivery)
        except TimeoutError as error:
            message = f"{LOST}, and no other could go on with it within {self._timeouts.resume_s:g} s"
            raise EngineDeadError(message) from error
        replica, num_tokens = passage.flight.replica, delivery.num_tokens
        fields = {"replica": replica, "resumed": delivery.request_id, "num_tokens": num_tokens}
        message = "request %s lost its engine replica and goes on at %s after %d tokens"
        logger.warning(message, delivery.request_id, replica, num_tokens, extra={"fields": fields})
        return passage

    async def _send_patiently(self, delivery: Delivery) -> _Passage:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._send_alone(delivery)
            except RequestRejectedError:
                raise
            except EngineError:
                if self._links.is_closed:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _send_alone(self, delivery: Delivery) -> _Passage:
        """`_send`, and the wait for the first output before another lost request is sent; but nobody waits long.

        A replica lost meanwhile is held against this request.
        """
        try:
            async with asyncio.timeout(_LONGEST_WAIT_FOR_TRIAL_S):
                await self._trial.acquire()
        except TimeoutError:
            return await self._send(delivery)
        try:
            passage = await self._send(delivery)
            try:
                async with asyncio.timeout(_TRIAL_S):
                    await passage.flight.listen()
            except TimeoutError:
                return passage
            except BaseException:
                self._leave(passage)
                raise
        finally:
            self._trial.release()
        if passage.flight.is_lost_silently:
            delivery.accuse()
        return passage

    async def _send(self, delivery: Delivery) -> _Passage:
        """Gets what is left of a request accepted by some replica. Raises EngineError."""
        while True:
            flight = Flight(delivery.next_id())
            # First of all, because outputs may come before the answer to the call.
            self._flights.add(flight)
            try:
                return await self._offer(delivery, flight)
            except BaseException as error:
                self._flights.remove(flight)
                # It may be that replica's: another is asked, under a name which that one has not heard.
                if not isinstance(error, SilentError):
                    raise

    async def _offer(self, delivery: Delivery, flight: Flight) -> _Passage:
        refusal: EngineError | None = None
        avoid = self._links.unfit(delivery.system_fingerprint)
        asked: set[str] = set()
        for _ in range(_MAX_ATTEMPTS):
            if self._links.is_closed:
                break
            call, verdict = await self._links.ask(
                delivery.rest(flight.request_id),
                avoid=avoid | delivery.lost_replicas | asked,
                system_fingerprint=delivery.system_fingerprint,
            )
            assert isinstance(verdict, Verdict)
            if verdict.refusal is None:
                delivery.accepted(verdict.replica, verdict.system_fingerprint)
                flight.replica = verdict.replica
                self._links.run(self._watch(call, flight))
                return _Passage(flight, call)
            refusal = _soonest(refusal, verdict.refusal)
            if isinstance(refusal, RequestRejectedError) or verdict.replica in asked:
                break
            if isinstance(verdict.refusal, StreamError):
                await self._links.open(verdict.replica)
            else:
                asked.add(verdict.replica)
        raise refusal or EngineDeadError(_CLOSING)

    def _leave(self, passage: _Passage) -> None:
        """Nobody reads any more what comes of a request there."""
        flight = passage.flight
        self._flights.remove(flight)
        if not flight.is_finished:
            flight.lose(LOST)
            cancel(passage.call)

    async def _watch(self, call: Call, flight: Flight) -> None:
        """Waits for the end of a request's call: whatever ended it, the reader gets its last output."""
        try:
            async for _ in call:
                pass
            if not flight.is_over:
                await asyncio.sleep(_LAST_OUTPUT_TIMEOUT_S)
        except Exception as error:
            if not flight.is_over:
                logger.warning("a request's call to its engine replica failed: %s", first_line(error))
        flight.lose(LOST)


def _soonest(first: EngineError | None, then: EngineError) -> EngineError:
    """Of two replicas' refusals the one to pass on: a full replica's that has room first, else the later."""
    if isinstance(first, EngineOverloadedError) and isinstance(then, EngineOverloadedError):
        return min(first, then, key=lambda refusal: refusal.retry_after_s)
    return then
