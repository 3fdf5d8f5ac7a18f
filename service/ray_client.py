"""The engine client over Ray Serve: one stream from every engine replica, one call for every request.

Knows how replicas are found, lost and asked; not how a cluster is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

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
from service.flight import EngineLostError, Flight
from service.ray_broadcast import ask_all
from service.ray_engine import PULSE_PERIOD_S, EngineReplica
from service.ray_fleet import ask_fleet
from service.wire import Hello, Item, Pulse, StepMessage, StreamError, Verdict, unpack

logger = logging.getLogger(__name__)

REPLICA_TIMEOUT_S = 10.0
RESUME_TIMEOUT_S = 60.0
WAKE_TIMEOUT_S = 120.0
TEND_PERIOD_S = 2.0
SILENCE_TIMEOUT_S = 6.0
_SILENCE_CHECK_PERIOD_S = 0.5
# A request that was lost begins anew while no other such request does, so that one that kills its replica is found out:
# for as long as this without an output, and once another has waited as long as that, it is not alone any more.
_TRIAL_S = 0.5
_LONGEST_WAIT_FOR_TRIAL_S = 2.0
_LAST_OUTPUT_TIMEOUT_S = 5.0
_PULSE_TIMEOUT_S = PULSE_PERIOD_S + 0.25
_PULSE_POLL_S = 0.02
# Of one request: a refusal by each of a few replicas, and streams to be opened first.
_MAX_ATTEMPTS = 10
_LOST = "the engine replica working on this request was lost"
_SILENT = "the engine replica does not answer"
_FOREIGN = "the engine replicas have another tokenizer than this gateway"
_CLOSING = "the server is shutting down"
# Between two tries to find a replica for a request that lost its own: twice as long each time.
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0

_Call = DeploymentResponseGenerator[Item]


@dataclass(slots=True, eq=False)
class _Link:
    """The stream from one replica."""

    replica: str
    info: EngineInfo
    stream: _Call
    pulse: Pulse
    pulse_at_s: float = field(default_factory=time.monotonic)
    heard_at_s: float = field(default_factory=time.monotonic)

    def hear(self, message: StepMessage) -> None:
        self.heard_at_s = time.monotonic()
        if message.pulse is not None:
            self.pulse, self.pulse_at_s = message.pulse, self.heard_at_s

    @property
    def health(self) -> EngineHealth:
        return self.pulse.health

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.heard_at_s


@dataclass(frozen=True, slots=True)
class _Passage:
    """A request under way at a replica that has accepted it."""

    flight: Flight
    call: _Call


class RayEngineClient:
    """Implements the gateway's `EngineClient` over the replicas of one deployment.

    All methods are called on the event loop that `connect` ran on. Replicas may come and go at any time. A request
    whose replica is lost goes on at another that gives the same bytes, if one takes it within `resume_timeout_s`; 0
    ends it with an error instead. A replica that says nothing for `silence_timeout_s` counts as lost, though it may
    come back; they speak every second. Where `tokenizer` is given, replicas beside whose weights another one lies are
    left alone: what this gateway calls a token is another one there.
    """

    def __init__(
        self,
        deployment: DeploymentHandle[EngineReplica],
        *,
        tokenizer: str | None = None,
        replica_timeout_s: float = REPLICA_TIMEOUT_S,
        resume_timeout_s: float = RESUME_TIMEOUT_S,
        wake_timeout_s: float = WAKE_TIMEOUT_S,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        # By value (gRPC between the processes, plain pickle) a message costs a fifth of one through Ray's objects.
        self._handle = deployment.options(
            method_name="open",
            stream=True,
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )
        self._id = uuid.uuid4().hex
        self._replica_timeout_s = replica_timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._wake_timeout_s = wake_timeout_s
        self._woken_s: float | None = None
        self._fleet: Fleet | None = None
        self._silence_timeout_s = silence_timeout_s
        self._links: dict[str, _Link] = {}
        self._silent: set[str] = set()
        self._tokenizer = tokenizer
        self._foreign: set[str] = set()
        self._num_given_up = 0
        self._unanswered: set[asyncio.Timeout] = set()
        self._trial = asyncio.Lock()
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self._info: EngineInfo | None = None
        self._is_closed = False

    @classmethod
    async def connect(
        cls,
        deployment: DeploymentHandle[EngineReplica],
        *,
        tokenizer: str | None = None,
        replica_timeout_s: float = REPLICA_TIMEOUT_S,
        resume_timeout_s: float = RESUME_TIMEOUT_S,
        wake_timeout_s: float = WAKE_TIMEOUT_S,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> RayEngineClient:
        """A client with a stream from every replica there is. Raises EngineError when none answers in time."""
        client = cls(
            deployment,
            tokenizer=tokenizer,
            replica_timeout_s=replica_timeout_s,
            resume_timeout_s=resume_timeout_s,
            wake_timeout_s=wake_timeout_s,
            silence_timeout_s=silence_timeout_s,
        )
        try:
            await client._open_link()
            await client._look_around()
        except BaseException:
            await client.close()
            raise
        client._start(client._tend())
        client._start(client._give_up_silent_replicas())
        return client

    async def info(self) -> EngineInfo:
        """See `EngineClient.info`."""
        assert self._info is not None
        return self._info

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
                if delivery.lose() and self._resume_timeout_s and not self._is_closed:
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
        healths = [link.health for link in self._links.values()]
        if not healths:
            if self._is_asleep:
                return EngineHealth(True, "no engine replica runs; a request starts one", is_asleep=True)
            return EngineHealth(False, _FOREIGN if self._foreign else "no engine replica is reachable")
        return min(healths, key=lambda health: (not health.is_healthy, health.seconds_since_progress))

    async def stats(self, *, max_age_s: float = 0.0) -> Sequence[EngineStats]:
        """See `EngineClient.stats`. A replica that takes no more requests is not asked: its next pulse counts.

        One that is silent is left out: what it said before would take back what another gateway has told since.
        """
        if max_age_s >= PULSE_PERIOD_S:
            return [link.pulse.stats for link in self._links.values()]
        asked_at_s, told = time.monotonic(), dict[str, EngineStats]()
        with contextlib.suppress(Exception):
            told, _ = await self._ask_stats()
        others = [link for link in self._links.values() if link.replica not in told]
        while any(link.pulse_at_s < asked_at_s for link in others if link.replica in self._links):
            if time.monotonic() > asked_at_s + _PULSE_TIMEOUT_S:
                break
            await asyncio.sleep(_PULSE_POLL_S)
        return [*told.values(), *(link.pulse.stats for link in others if link.pulse_at_s >= asked_at_s)]

    def fleet(self) -> Fleet | None:
        """See `EngineClient.fleet`: at most a few seconds old."""
        return self._fleet

    async def inspect(self, seconds: float = 0.0) -> Sequence[Inspection]:
        """See `EngineClient.inspect`. A replica that does not answer within a second is left out."""
        try:
            return (await ask_all(self._handle, "inspect", seconds)).told
        except DeploymentUnavailableError:  # as after scaling to none
            return ()

    async def close(self) -> None:
        """Ends every stream, and with it, on the replicas, every request of this gateway."""
        self._is_closed = True
        for flight in self._flights.values():
            flight.lose(_CLOSING)
        for link in list(self._links.values()):
            self._drop(link)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    # Requests

    async def _place(self, delivery: Delivery) -> _Passage:
        """Gets what is left of a request accepted: at once, or, after a loss, within a time. Raises EngineError."""
        if not delivery.num_losses:
            return await self._send(delivery)
        try:
            async with asyncio.timeout(self._resume_timeout_s):
                passage = await self._send_patiently(delivery)
        except TimeoutError as error:
            message = f"{_LOST}, and no other could go on with it within {self._resume_timeout_s:g} s"
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
                if self._is_closed:
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
            self._flights[flight.request_id] = flight
            try:
                return await self._offer(delivery, flight)
            except BaseException as error:
                del self._flights[flight.request_id]
                # It may be that replica's: another is asked, under a name which that one has not heard.
                if not isinstance(error, _SilentError):
                    raise

    async def _offer(self, delivery: Delivery, flight: Flight) -> _Passage:
        refusal: EngineError | None = None
        avoid = self._unfit(delivery.system_fingerprint) | self._silent | self._foreign
        asked: set[str] = set()
        for _ in range(_MAX_ATTEMPTS):
            if self._is_closed:
                break
            call = self._call(
                delivery.rest(flight.request_id),
                avoid=avoid | delivery.lost_replicas | asked,
                system_fingerprint=delivery.system_fingerprint,
            )
            verdict = await self._first(call)
            assert isinstance(verdict, Verdict)
            if verdict.refusal is None:
                delivery.accepted(verdict.replica, verdict.system_fingerprint)
                flight.replica = verdict.replica
                self._start(self._watch(call, flight))
                return _Passage(flight, call)
            refusal = _soonest(refusal, verdict.refusal)
            if isinstance(refusal, RequestRejectedError) or verdict.replica in asked:
                break
            if isinstance(verdict.refusal, StreamError):
                await self._open_link(verdict.replica)
            else:
                asked.add(verdict.replica)
        raise refusal or EngineDeadError(_CLOSING)

    def _unfit(self, system_fingerprint: str) -> set[str]:
        """Replicas that are not well, or, where there is a fingerprint, give other bytes."""
        return {
            link.replica
            for link in self._links.values()
            if not link.health.is_healthy or system_fingerprint not in ("", link.info.system_fingerprint)
        }

    def _leave(self, passage: _Passage) -> None:
        """Nobody reads any more what comes of a request there."""
        flight = passage.flight
        del self._flights[flight.request_id]
        if not flight.is_finished:
            flight.lose(_LOST)
            _cancel(passage.call)

    async def _watch(self, call: _Call, flight: Flight) -> None:
        """Waits for the end of a request's call: whatever ended it, the reader gets its last output."""
        try:
            async for _ in call:
                pass
            if not flight.is_over:
                await asyncio.sleep(_LAST_OUTPUT_TIMEOUT_S)
        except Exception as error:
            if not flight.is_over:
                logger.warning("a request's call to its engine replica failed: %s", _first_line(error))
        flight.lose(_LOST)

    # Calls

    def _call(self, request: Request | None, *, avoid: set[str], system_fingerprint: str = "") -> _Call:
        hint = {"avoid": avoid} if avoid else {}
        # In a context of its own: a gateway that is a replica answers each client in a context of Serve's, which gives
        # all calls made there one id, so that its router mixes them up, and ends them when the client goes.
        call = partial(self._handle.remote, self._id, request, system_fingerprint=system_fingerprint, **hint)
        return cast(_Call, Context().run(call))

    async def _first(self, call: _Call) -> Item:
        """The first item of a call. Raises EngineError, also when no replica takes it in time."""

        timeout_s = self._replica_timeout_s
        if self._is_asleep:
            timeout_s = self._wake()
        num_given_up = self._num_given_up

        async def answer() -> Item:
            async with asyncio.timeout(timeout_s) as limit:
                self._unanswered.add(limit)
                try:
                    return await anext(call)
                finally:
                    self._unanswered.discard(limit)

        def take_back(done: asyncio.Future[Item]) -> None:
            if not done.cancelled():
                done.exception()
            _cancel(call)

        first = asyncio.ensure_future(answer())
        try:
            # Shielded, because a call can be cancelled for certain only once it has answered.
            return await asyncio.shield(first)
        except asyncio.CancelledError:
            first.add_done_callback(take_back)
            raise
        except TimeoutError as error:
            _cancel(call)
            if num_given_up != self._num_given_up and not self._is_closed:
                raise _SilentError(_SILENT) from error
            if (await self.health()).is_healthy:
                raise EngineOverloadedError("every engine replica is busy", self._seconds_per_request) from error
            raise EngineDeadError("no engine replica is available") from error
        except Exception as error:
            _cancel(call)
            raise self._explained(error) from error

    @property
    def _is_asleep(self) -> bool:
        """Whether there is no replica because nothing was asked for, or the first one is on its way."""
        if self._links:
            return False
        return self._is_waking or (self._fleet is not None and self._fleet.num_wanted == 0)

    @property
    def _is_waking(self) -> bool:
        return self._woken_s is not None and time.monotonic() < self._woken_s + self._wake_timeout_s

    def _wake(self) -> float:
        """A call goes where there is no replica yet, which makes Serve start one: how long to wait for it."""
        now_s = time.monotonic()
        if self._woken_s is None or not self._is_waking:
            self._woken_s = now_s
            logger.info("no engine replica runs; a request starts one")
        return max(self._woken_s + self._wake_timeout_s - now_s, self._replica_timeout_s)

    @property
    def _seconds_per_request(self) -> float:
        """How long it takes until a request has ended on any replica, as they measured."""
        rates = [1 / max(link.pulse.stats.seconds_per_request, 1e-3) for link in self._links.values()]
        return 1 / sum(rates) if rates else 1.0

    def _explained(self, error: Exception) -> EngineError:
        """What a failed call means for the request it was made for."""
        if isinstance(error, BackPressureError):
            message = "the server is full: too many requests wait for an engine replica"
            return EngineOverloadedError(message, self._seconds_per_request)
        logger.warning("a call to an engine replica failed: %s", _first_line(error))
        return EngineDeadError("no engine replica could take the request")

    # Replicas

    async def _open_link(self, replica: str | None = None) -> None:
        """Opens a stream from a replica that there is none from yet. Raises EngineError.

        `replica` is who asked for it: nothing is done where its stream has been opened in the meantime.
        """
        async with self._opening:
            if self._is_closed or replica in self._links:
                return
            while True:
                stream = self._call(None, avoid=self._links.keys() | self._silent | self._foreign)
                hello = await self._first(stream)
                if isinstance(hello, Verdict) and hello.refusal:
                    raise hello.refusal
                assert isinstance(hello, Hello)
                if self._tokenizer in (None, hello.info.tokenizer):
                    break
                _cancel(stream)
                self._leave_alone(hello.replica)
            self._info = self._info or hello.info
            self._woken_s = None
            link = self._links[hello.replica] = _Link(hello.replica, hello.info, stream, hello.pulse)
            self._start(self._read(link))

    def _leave_alone(self, replica: str) -> None:
        """Asks no more of a replica with another tokenizer. Raises EngineDeadError where that was known before."""
        if replica in self._foreign:
            raise EngineDeadError(_FOREIGN)
        logger.warning("engine replica %s has another tokenizer than this gateway: it is not used", replica)
        self._foreign.add(replica)

    async def _read(self, link: _Link) -> None:
        """Hands on what a replica's stream brings, until it ends."""
        try:
            async for message in link.stream:
                assert isinstance(message, StepMessage)
                link.hear(message)
                for line in message.log:
                    fields = {"replica": link.replica, "message": line}
                    logger.warning("engine replica %s: %s", link.replica, line, extra={"fields": fields})
                for output in map(unpack, message.outputs):
                    flight = self._flights.get(output.request_id)
                    if flight is not None:
                        flight.put(output)
        except Exception as error:
            if self._links.get(link.replica) is link:
                logger.warning("lost engine replica %s: %s", link.replica, _first_line(error))
        finally:
            self._drop(link)

    def _drop(self, link: _Link) -> None:
        """Forgets a replica's stream; requests that still wait for it have lost it."""
        if self._links.get(link.replica) is link:
            del self._links[link.replica]
            _cancel(link.stream)
            for flight in self._flights.values():
                if flight.replica == link.replica:
                    flight.lose(_LOST)

    async def _give_up_silent_replicas(self) -> None:
        """Looks for streams that say nothing, for as long as the client lives: a process that is stopped ends none."""
        while True:
            slept_at_s = time.monotonic()
            await asyncio.sleep(_SILENCE_CHECK_PERIOD_S)
            now_s = time.monotonic()
            # While this process itself did not run, nobody could be heard.
            late_s = now_s - slept_at_s - _SILENCE_CHECK_PERIOD_S
            for link in list(self._links.values()):
                if late_s > _SILENCE_CHECK_PERIOD_S:
                    link.heard_at_s = min(link.heard_at_s + late_s, now_s)
                if link.silent_s > self._silence_timeout_s:
                    self._give_up(link)

    def _give_up(self, link: _Link) -> None:
        """Drops a silent replica's stream, and asks anew where an answer may be waited for in vain."""
        logger.warning("engine replica %s has said nothing for %.0f s", link.replica, link.silent_s)
        self._silent.add(link.replica)
        self._num_given_up += 1
        self._drop(link)
        for limit in self._unanswered:
            limit.reschedule(asyncio.get_running_loop().time())

    async def _tend(self) -> None:
        """Looks for replicas that came or went, for as long as the client lives."""
        while True:
            await asyncio.sleep(TEND_PERIOD_S)
            await self._look_around()

    async def _look_around(self) -> None:
        await self._look_at_fleet()
        try:
            told, num_silent = await self._ask_stats()
        except DeploymentUnavailableError:
            told, num_silent = {}, 0
        except Exception as error:
            logger.debug("cannot list the engine replicas: %s", _first_line(error))
            return
        replicas = set(told)
        # What has answered has come back; where all have, the others are gone.
        self._silent = self._silent - replicas if num_silent else set()
        self._foreign &= replicas
        # A replica that takes no more requests waits for its last stream to be closed in order to go.
        busy = {flight.replica for flight in self._flights.values()}
        if not num_silent:
            for replica in self._links.keys() - replicas - busy:
                self._drop(self._links[replica])
        for _ in replicas - self._links.keys() - self._foreign:
            with contextlib.suppress(EngineError):
                await self._open_link()

    async def _look_at_fleet(self) -> None:
        was_asleep = self._is_asleep
        try:
            self._fleet = await ask_fleet(self._handle.app_name, self._handle.deployment_name)
        except Exception as error:  # The controller may be away; replicas are not.
            logger.debug("cannot ask how many engine replicas there should be: %s", _first_line(error))
        if was_asleep and not self._is_asleep and not self._links:
            self._wake()  # as somebody else's request has done

    async def _ask_stats(self) -> tuple[dict[str, EngineStats], int]:
        """What the replicas that take requests say of themselves within a second, and how many of them do not."""
        answers = await ask_all(self._handle, "stats")
        return {stats.replica: stats for stats in answers.told}, answers.num_silent

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _SilentError(EngineDeadError):
    """The answer was not waited for any longer, because a replica fell silent meanwhile."""


def _cancel(call: _Call) -> None:
    call.cancel()  # type: ignore[no-untyped-call]


def _soonest(first: EngineError | None, then: EngineError) -> EngineError:
    """Of two replicas' refusals the one to pass on: a full replica's that has room first, else the later."""
    if isinstance(first, EngineOverloadedError) and isinstance(then, EngineOverloadedError):
        return min(first, then, key=lambda refusal: refusal.retry_after_s)
    return then


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
