"""Whether one more request fits: what an engine holds is bounded, by requests and tokens, in all and for each key."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.engine.drain_rate import DrainRate
from service.engine.errors import EngineOverloadedError, KeyOverloadedError
from service.engine.request import Request


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`max_num_running` requests may run; beyond them `max_num_waiting` may wait, of `max_num_waiting_tokens` tokens.

    Tokens are those of the prompt and of the longest completion allowed.
    """

    max_num_running: int
    max_num_waiting: int
    max_num_waiting_tokens: int

    @property
    def max_num_requests(self) -> int:
        return self.max_num_running + self.max_num_waiting


class Admission:
    """Counts what was accepted and has not ended. For one thread.

    `running` tells the requests that run at this moment; being late by a step does no harm. Nor does a request that has
    ended and whose end is still to be told: it counts as waiting until then.

    A key may have as many requests waiting, and tokens, as there are places still free: so one that floods the queue
    gets half of it, two get a third each, and there is always room for one that has nothing there. (These are the
    dynamic thresholds of Choudhury and Hahne, 1998, for buffers that several ports share.) Requests without a key are
    bounded by the size of the queue alone. What could run at once is never refused, and one request may always wait.
    """

    def __init__(
        self,
        limits: QueueLimits,
        running: Callable[[], Iterable[Request]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._running = running
        self._rate = DrainRate(clock)
        self._clock = clock
        self._next_place_s = 0.0
        self._live: dict[str, Request] = {}
        self._num_tokens = 0
        self._by_key: Counter[str] = Counter()
        self._tokens_by_key: Counter[str] = Counter()

    def accept(self, request: Request) -> None:
        """Counts `request`. Raises EngineOverloadedError or KeyOverloadedError where it does not fit.

        One that is resumed always does: there are no more of them than lost engines had room for.
        """
        if len(self._live) >= self._limits.max_num_running and not request.is_resumed:
            self._check(request)
        self._rate.busy()
        self._live[request.request_id] = request
        self._count(request, 1)

    def end(self, request_id: str) -> None:
        """A request that was accepted has ended."""
        request = self._live.pop(request_id)
        self._count(request, -1)
        self._rate.ended(request.max_num_tokens)
        if not self._live:
            self._rate.idle()

    @property
    def live(self) -> list[Request]:
        """What was accepted and has not ended."""
        return list(self._live.values())

    @property
    def seconds_per_request(self) -> float:
        """How long it takes until one more request has ended, as measured."""
        return self._rate.seconds_until(1, 0)

    def _count(self, request: Request, sign: int) -> None:
        self._num_tokens += sign * request.max_num_tokens
        if request.key_id:
            self._by_key[request.key_id] += sign
            self._tokens_by_key[request.key_id] += sign * request.max_num_tokens
            if not self._by_key[request.key_id]:
                del self._by_key[request.key_id], self._tokens_by_key[request.key_id]

    def _check(self, request: Request) -> None:
        limits, running = self._limits, list(self._running())
        num_free = limits.max_num_requests - len(self._live)
        if num_free <= 0:
            raise EngineOverloadedError(
                f"the server is full: {len(self._live)} requests are running or waiting", self._come_back_s(0)
            )
        num_waiting_tokens = self._num_tokens - sum(r.max_num_tokens for r in running)
        num_free_tokens = limits.max_num_waiting_tokens - num_waiting_tokens
        excess = request.max_num_tokens - num_free_tokens
        if excess > 0 and len(self._live) > len(running):
            raise EngineOverloadedError(
                f"the server is full: requests of {num_waiting_tokens} tokens wait", self._come_back_s(excess)
            )
        if request.key_id:
            self._check_share(request, [r for r in running if r.key_id == request.key_id], num_free, num_free_tokens)

    def _come_back_s(self, num_tokens: int) -> float:
        """After how long a request that is refused now has a chance, `num_tokens` being what must have ended.

        Those refused stand in a line, one for each place to be freed, so that not all of them come back for the same
        one. Nobody is sent away for longer than all that is here takes.
        """
        now_s = self._clock()
        next_place_s = max(self._next_place_s, now_s) + self._rate.seconds_until(1, 0)
        self._next_place_s = min(next_place_s, now_s + self._rate.seconds_until(len(self._live), 0))
        return max(self._next_place_s - now_s, self._rate.seconds_until(1, num_tokens))

    def _check_share(self, request: Request, running: list[Request], num_free: int, num_free_tokens: int) -> None:
        key = request.key_id
        num_waiting = self._by_key[key] - len(running)
        num_tokens = self._tokens_by_key[key] - sum(r.max_num_tokens for r in running)
        if num_waiting < num_free and (num_tokens + request.max_num_tokens <= num_free_tokens or num_waiting <= 0):
            return
        raise KeyOverloadedError(
            f"this API key has {num_waiting} requests of {num_tokens} tokens waiting, which is its share of the queue",
            self._come_back_s(request.max_num_tokens),
        )
