"""Clients that ask without pause and compare every answer with the one an undisturbed server gave."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

from loadtests.chaos.question import Question
from loadtests.chaos.reading import Outcome, Reading, outcome
from loadtests.chaos.slow_reader import read_slowly
from loadtests.client import CompletionClient
from loadtests.connection import Answer, Disconnected
from loadtests.http1 import MalformedResponse
from loadtests.target import Target

MAX_TOLD = 5
# A client that is refused comes back after this.
_BACKOFF_S = 0.2
_NUM_DAWDLERS = 6
# What a proxy says, in words of its own, where a gateway is gone before it has begun to answer.
_PROXY_ERROR = 500


Asked = tuple[Question, Reading]
"""A request, and the answer of an undisturbed server."""


@dataclass(slots=True)
class Tally:
    """What became of all requests; of `LOST`, `FAILED` and `CUT` also why. `longest_pause_s` is a finished stream's."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    longest_pause_s: float = 0.0

    @property
    def num_accepted(self) -> int:
        return self.counts.total() - self.counts[Outcome.REFUSED]

    def add(self, kind: str, result: Outcome, reason: str) -> None:
        self.counts[result] += 1
        if result in (Outcome.LOST, Outcome.FAILED, Outcome.CUT) and len(self.reasons) < MAX_TOLD:
            self.reasons.append(f"{kind} {result.value}: {reason}")

    def pause(self, answer: Answer, asked_s: float) -> None:
        times = [asked_s, *(at_s for _, at_s in answer.arrivals)]
        self.longest_pause_s = max([self.longest_pause_s, *(b - a for a, b in pairwise(times))])


class Crowd:
    """`size` clients while entered; leaving waits until each has its last answer.

    The last of `asked` is the broadest. `may_be_cut` is where a gateway is broken, and a connection may end with it.
    """

    def __init__(
        self,
        target: Target,
        client: CompletionClient,
        asked: Sequence[Asked],
        size: int,
        seed: str,
        *,
        may_be_cut: bool = False,
    ) -> None:
        self.asked = asked
        self._may_be_cut = may_be_cut
        self._target = target
        self.tally = Tally()
        self._client = client
        self._size = size
        self._seed = seed
        self._is_over = False
        self._users: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Crowd:
        rngs = [random.Random(f"{self._seed}:{number}") for number in range(self._size)]
        self._users = [asyncio.create_task(self._user(rng)) for rng in rngs]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._is_over = True
        if error[0] is not None:
            for user in self._users:
                user.cancel()
        await asyncio.gather(*self._users, return_exceptions=error[0] is not None)

    async def _user(self, rng: random.Random) -> None:
        while not self._is_over:
            question, reference = rng.choice(self.asked)
            if await self.ask(question, reference) is not Outcome.FINISHED:
                await asyncio.sleep(_BACKOFF_S)

    async def dawdle(self, rng: random.Random) -> tuple[int, int]:
        """Clients that stop reading the broadest answer for a while; how many went on then, and how many hung up."""
        staying = [self._linger(rng.uniform(2, 4)) for _ in range(_NUM_DAWDLERS)]
        leaving = [self._linger(rng.uniform(1, 2), leaves=True) for _ in range(_NUM_DAWDLERS)]
        await asyncio.gather(*staying, *leaving)
        return len(staying), len(leaving)

    async def _linger(self, pause_s: float, *, leaves: bool = False) -> None:
        question, reference = self.asked[-1]
        try:
            status, body = await read_slowly(self._target, question.body, pause_s, leaves=leaves)
        except (OSError, MalformedResponse, TimeoutError) as error:
            self.tally.add("slow reader", Outcome.LOST, f"{type(error).__name__}: {error}")
            return
        if not leaves:
            self.tally.add("slow reader", *outcome(question, reference, status, body))

    async def ask(self, question: Question, reference: Reading) -> Outcome:
        """One request, booked."""
        asked_s = perf_counter()
        try:
            answer = await self._client.post("/v1/completions", question.body)
        except Disconnected as error:
            result, reason = Outcome.CUT if self._may_be_cut else Outcome.LOST, str(error)
        except (OSError, MalformedResponse, TimeoutError) as error:
            result, reason = Outcome.LOST, f"{type(error).__name__}: {error or 'no answer in time'}"
        else:
            result, reason = outcome(question, reference, answer.head.status, answer.body)
            if self._may_be_cut and answer.head.status == _PROXY_ERROR and result is Outcome.LOST:
                result = Outcome.CUT
            if result is Outcome.FINISHED and question.is_stream:
                self.tally.pause(answer, asked_s)
        self.tally.add(question.kind, result, reason)
        return result
