"""The replicas of one deployment as a gateway has them: a stream from each, how they are, and calls to them.

Knows who is there and who has been lost; of requests only that they go to a replica and outputs come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine, Set
from contextvars import Context
from functools import partial
from typing import Any, cast

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from service.engine.errors import EngineDeadError, EngineError, EngineOverloadedError
from service.engine.request import Request
from service.engine.stats import EngineHealth, EngineInfo, EngineStats
from service.flight import Flights
from service.ray_broadcast import ask_all
from service.ray_engine import EngineReplica
from service.ray_fleet import FleetWatch
from service.ray_link import Call, Link, Timeouts, cancel, first_line
from service.wire import Hello, Item, StepMessage, Verdict, unpack

logger = logging.getLogger(__name__)

LOST = "the engine replica working on this request was lost"
TEND_PERIOD_S = 2.0
_SILENCE_CHECK_PERIOD_S = 0.5
_SILENT = "the engine replica does not answer"
_FOREIGN = "the engine replicas have another tokenizer than this gateway"


class SilentError(EngineDeadError):
    """The answer was not waited for any longer, because a replica fell silent meanwhile."""


class Links:
    """A stream from every replica there is, each of which may come and go at any time.

    What comes of requests goes to `flights`, and those whose replica is lost end there. One that says nothing counts as
    lost, though it may come back. One with another tokenizer than `tokenizer`, if that is given, is left alone: what
    this gateway calls a token is another one there.
    """

    def __init__(
        self, deployment: DeploymentHandle[EngineReplica], flights: Flights, timeouts: Timeouts, tokenizer: str | None
    ) -> None:
        # By value (gRPC between the processes, plain pickle) a message costs a fifth of one through Ray's objects.
        self.handle = deployment.options(
            method_name="open",
            stream=True,
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )
        self.watch = FleetWatch(deployment.app_name, deployment.deployment_name, timeouts.wake_s)
        self.by_replica: dict[str, Link] = {}
        self.info: EngineInfo | None = None
        self.is_closed = False
        self._id = uuid.uuid4().hex
        self._flights = flights
        self._timeouts = timeouts
        self._tokenizer = tokenizer
        self._silent: set[str] = set()
        self._foreign: set[str] = set()
        self._num_given_up = 0
        self._unanswered: set[asyncio.Timeout] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()

    async def start(self) -> None:
        """Opens streams from all replicas, and from now on looks after them. Raises EngineError where none answers."""
        await self.open()
        await self._look_around()
        self.run(self._tend())
        self.run(self._give_up_silent_replicas())

    async def close(self) -> None:
        """Ends every stream, and with it, on the replicas, every request of this gateway."""
        self.is_closed = True
        for link in list(self.by_replica.values()):
            self._drop(link)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Does `work` beside everything else, until `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Calls

    async def ask(self, request: Request | None, *, avoid: Set[str], system_fingerprint: str = "") -> tuple[Call, Item]:
        """Sends a request to some replica, to one of `avoid` only where there is no other; without one, asks for a
        stream. Returns the call and its first item.

        Raises EngineError, also when no replica takes it in time.
        """
        timeout_s = await self._patience_s()
        hint = {"avoid": avoid} if avoid else {}
        # In a context of its own: a gateway that is a replica answers each client in a context of Serve's, which gives
        # all calls made there one id, so that its router mixes them up, and ends them when the client goes.
        send = partial(self.handle.remote, self._id, request, system_fingerprint=system_fingerprint, **hint)
        call = cast(Call, Context().run(send))
        return call, await self._first(call, timeout_s)

    async def _patience_s(self) -> float:
        """How long a call that is made now may wait for a replica."""
        if not self.by_replica and not self.watch.is_asleep:
            await self._look_at_fleet()  # The last one may just have gone.
        return max(self.watch.wake() if self.is_asleep else 0.0, self._timeouts.replica_s)

    async def _first(self, call: Call, timeout_s: float) -> Item:
        """The first item of a call."""
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
            cancel(call)

        first = asyncio.ensure_future(answer())
        try:
            # Shielded, because a call can be cancelled for certain only once it has answered.
            return await asyncio.shield(first)
        except asyncio.CancelledError:
            first.add_done_callback(take_back)
            raise
        except TimeoutError as error:
            cancel(call)
            if num_given_up != self._num_given_up and not self.is_closed:
                raise SilentError(_SILENT) from error
            if self.health().is_healthy:
                raise EngineOverloadedError("every engine replica is busy", self._seconds_per_request) from error
            raise EngineDeadError("no engine replica is available") from error
        except Exception as error:
            cancel(call)
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> EngineError:
        """What a failed call means for the request it was made for."""
        if isinstance(error, BackPressureError):
            message = "the server is full: too many requests wait for an engine replica"
            return EngineOverloadedError(message, self._seconds_per_request)
        logger.warning("a call to an engine replica failed: %s", first_line(error))
        return EngineDeadError("no engine replica could take the request")

    # How they are

    def health(self) -> EngineHealth:
        """Green while any replica is."""
        healths = [link.health for link in self.by_replica.values()]
        if not healths:
            if self.is_asleep:
                return EngineHealth(True, "no engine replica runs; a request starts one", is_asleep=True)
            return EngineHealth(False, _FOREIGN if self._foreign else "no engine replica is reachable")
        return min(healths, key=lambda health: (not health.is_healthy, health.seconds_since_progress))

    @property
    def is_asleep(self) -> bool:
        """Whether there is no replica because nothing was asked for, or the first one is on its way."""
        return not self.by_replica and self.watch.is_asleep

    def unfit(self, system_fingerprint: str) -> set[str]:
        """Replicas that are not well, of no use to this gateway or, where there is a fingerprint, give other bytes."""
        return (
            self._silent
            | self._foreign
            | {
                link.replica
                for link in self.by_replica.values()
                if not link.health.is_healthy or system_fingerprint not in ("", link.info.system_fingerprint)
            }
        )

    async def ask_stats(self) -> tuple[dict[str, EngineStats], int]:
        """What the replicas that take requests say of themselves within a second, and how many of them do not.

        Raises DeploymentUnavailableError where there are none.
        """
        answers = await ask_all(self.handle, "stats")
        return {stats.replica: stats for stats in answers.told}, answers.num_silent

    @property
    def _seconds_per_request(self) -> float:
        """How long it takes until a request has ended on any replica, as they measured."""
        rates = [1 / max(link.pulse.stats.seconds_per_request, 1e-3) for link in self.by_replica.values()]
        return 1 / sum(rates) if rates else 1.0

    # Who is there

    async def open(self, replica: str | None = None) -> None:
        """Opens a stream from a replica that there is none from yet. Raises EngineError.

        `replica` is who asked for it: nothing is done where its stream has been opened in the meantime.
        """
        async with self._opening:
            if self.is_closed or replica in self.by_replica:
                return
            stream, hello = await self._ask_for_stream()
            self.info = self.info or hello.info
            self.watch.is_up()
            link = self.by_replica[hello.replica] = Link(hello.replica, hello.info, stream, hello.pulse)
            self.run(self._read(link))

    async def _ask_for_stream(self) -> tuple[Call, Hello]:
        while True:
            stream, hello = await self.ask(None, avoid=self.by_replica.keys() | self._silent | self._foreign)
            if isinstance(hello, Verdict) and hello.refusal:
                raise hello.refusal
            assert isinstance(hello, Hello)
            if self._tokenizer in (None, hello.info.tokenizer):
                return stream, hello
            cancel(stream)
            if hello.replica in self._foreign:
                raise EngineDeadError(_FOREIGN)
            logger.warning("engine replica %s has another tokenizer than this gateway: it is not used", hello.replica)
            self._foreign.add(hello.replica)

    async def _read(self, link: Link) -> None:
        """Hands on what a replica's stream brings, until it ends."""
        try:
            async for message in link.stream:
                assert isinstance(message, StepMessage)
                link.hear(message)
                for line in message.log:
                    fields = {"replica": link.replica, "message": line}
                    logger.warning("engine replica %s: %s", link.replica, line, extra={"fields": fields})
                for packed in message.outputs:
                    self._flights.put(unpack(packed))
        except Exception as error:
            if self.by_replica.get(link.replica) is link:
                logger.warning("lost engine replica %s: %s", link.replica, first_line(error))
        finally:
            self._drop(link)

    def _drop(self, link: Link) -> None:
        """Forgets a replica's stream; requests that still wait for it have lost it."""
        if self.by_replica.get(link.replica) is link:
            del self.by_replica[link.replica]
            cancel(link.stream)
            self._flights.lose(LOST, link.replica)

    async def _give_up_silent_replicas(self) -> None:
        """Looks for streams that say nothing, for as long as the client lives: a process that is stopped ends none."""
        while True:
            slept_at_s = time.monotonic()
            await asyncio.sleep(_SILENCE_CHECK_PERIOD_S)
            now_s = time.monotonic()
            # While this process itself did not run, nobody could be heard.
            late_s = now_s - slept_at_s - _SILENCE_CHECK_PERIOD_S
            for link in list(self.by_replica.values()):
                if late_s > _SILENCE_CHECK_PERIOD_S:
                    link.heard_at_s = min(link.heard_at_s + late_s, now_s)
                if link.silent_s > self._timeouts.silence_s:
                    self._give_up(link)

    def _give_up(self, link: Link) -> None:
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
            told, num_silent = await self.ask_stats()
        except DeploymentUnavailableError:
            told, num_silent = {}, 0
        except Exception as error:
            logger.debug("cannot list the engine replicas: %s", first_line(error))
            return
        replicas = set(told)
        # What has answered has come back; where all have, the others are gone.
        self._silent = self._silent - replicas if num_silent else set()
        self._foreign &= replicas
        # A replica that takes no more requests waits for its last stream to be closed in order to go.
        if not num_silent:
            for replica in self.by_replica.keys() - replicas - self._flights.replicas:
                self._drop(self.by_replica[replica])
        for _ in replicas - self.by_replica.keys() - self._foreign:
            with contextlib.suppress(EngineError):
                await self.open()

    async def _look_at_fleet(self) -> None:
        was_asleep = self.is_asleep
        await self.watch.look()
        if was_asleep and not self.is_asleep and not self.by_replica:
            self.watch.wake()  # as somebody else's request has done
