"""Who is next: requests that wait, in an order fair between keys and free of starvation. Integers only.

Knows neither memory nor time; the scheduler asks it for the next request and tells it what was given to whom.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.engine.sequence import Sequence

# One unit of `Request.priority` is worth a head start of so many tokens.
PRIORITY_TOKENS = 65_536
# Service is counted in this fraction of a token, so that dividing by a weight stays in integers.
_SCALE = 1_000_000


@dataclass(slots=True)
class Account:
    """What one key has been given, and what of its waits.

    `service` is the tokens given to it over its weight. `waiting` is sorted by `Sequence.place`.
    """

    key_id: str
    weight: int = 1
    service: int = 0
    num_live: int = 0
    num_queued_tokens: int = 0
    waiting: list[Sequence] = field(default_factory=list)
    priorities: Counter[int] = field(default_factory=Counter)

    @property
    def urgency(self) -> int:
        """Lower is sooner. The head inherits the priority of whatever waits behind it, which cannot overtake it."""
        return self.service + min(self.priorities) * PRIORITY_TOKENS * _SCALE


class WaitingQueue:
    """The virtual token counters of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024, section 4),
    with priorities added.

    Between keys, the one that was given the fewest tokens for its weight is next. A key that comes back after having
    had nothing to wait for starts level with the others: what it did not ask for is not owed to it. Within a key,
    requests go in the order in which they came, but a request is placed as if `priority * PRIORITY_TOKENS` more tokens
    had come before it: a later one overtakes it only within that distance. Between keys, the same head start counts
    as if that many tokens fewer had been given. Both are bounded, so every request gets its turn.

    Preempted requests come before all others, in the order in which they were first admitted.
    """

    def __init__(self) -> None:
        self.num_departed = 0
        self.num_departed_tokens = 0
        self._preempted: deque[Sequence] = deque()
        self._accounts: dict[str, Account] = {}
        self._last = Account("")
        self._num_arrived = 0
        self._num_admitted = 0
        self._num_waiting = 0
        self._num_live = 0

    def __len__(self) -> int:
        return self._num_waiting + len(self._preempted)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for account in self._accounts.values():
            yield from account.waiting

    @property
    def accounts(self) -> list[Account]:
        """Of every key with a request here or a debt. A copy that any thread may take."""
        return list(self._accounts.values())

    def append(self, sequence: Sequence) -> None:
        """Takes a request that has just come."""
        account = self._account_of(sequence)
        account.weight = sequence.request.weight
        if not account.waiting:
            account.service = max(account.service, self._floor())
        priority = sequence.request.priority
        sequence.place = (account.num_queued_tokens + priority * PRIORITY_TOKENS, self._num_arrived)
        account.num_queued_tokens += sequence.request.max_num_tokens
        account.num_live += 1
        self._num_live += 1
        account.priorities[priority] += 1
        insort(account.waiting, sequence, key=_place)
        self._num_arrived += 1
        self._num_waiting += 1

    def put_back(self, sequence: Sequence) -> None:
        """Takes a request that was admitted and lost its memory: the least senior of those that run."""
        self._preempted.appendleft(sequence)

    @property
    def head(self) -> Sequence | None:
        """The next to be admitted. Stays the same until something is added, taken, removed or charged."""
        if self._preempted:
            return self._preempted[0]
        backlogged = [account for account in self._accounts.values() if account.waiting]
        if not backlogged:
            return None
        return min(backlogged, key=lambda a: (a.urgency, a.waiting[0].place[1])).waiting[0]

    def take(self) -> Sequence:
        """The head, which waits no longer. Raises IndexError where there is none."""
        sequence = self.head
        if sequence is None:
            raise IndexError("nothing waits")
        self.remove(sequence)
        if sequence.seniority is None:
            sequence.seniority = self._num_admitted
            self._num_admitted += 1
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Takes a request out from wherever it waits."""
        if sequence.seniority is not None:
            self._preempted.remove(sequence)
            return
        account = self._account_of(sequence)
        del account.waiting[bisect_left(account.waiting, sequence.place, key=_place)]
        account.priorities -= Counter([sequence.request.priority])  # which also drops what is zero
        self._last = account
        self._num_waiting -= 1
        self.num_departed += 1
        self.num_departed_tokens += sequence.request.max_num_tokens

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """`num_tokens` were given to a request."""
        account = self._account_of(sequence)
        account.service += num_tokens * _SCALE // account.weight

    def forget(self, sequence: Sequence) -> None:
        """A request has ended, and waits no longer. Debts end with the last one."""
        account = self._account_of(sequence)
        account.num_live -= 1
        self._num_live -= 1
        if not self._num_live:
            self._accounts = {}
            self._last = Account("")

    def _account_of(self, sequence: Sequence) -> Account:
        key_id = sequence.request.key_id
        account = self._accounts.get(key_id)
        if account is None:
            # A key below the floor would be lifted to it: forgetting it loses nothing.
            floor = self._floor()
            self._accounts = {k: a for k, a in self._accounts.items() if a.num_live or a.service > floor}
            account = self._accounts[key_id] = Account(key_id)
        return account

    def _floor(self) -> int:
        """Where a key starts that had nothing waiting: level with the least served of those that have."""
        return min((a.service for a in self._accounts.values() if a.waiting), default=self._last.service)

    def check_integrity(self) -> None:
        """Raises AssertionError when an invariant is broken. For tests, after every step."""
        assert self._num_waiting == sum(len(account.waiting) for account in self._accounts.values())
        for key_id, account in self._accounts.items():
            assert key_id == account.key_id
            assert account.num_live >= len(account.waiting)
            assert [s.place for s in account.waiting] == sorted(s.place for s in account.waiting)
            assert account.priorities == Counter(s.request.priority for s in account.waiting)
            assert all(s.seniority is None and s.request.key_id == key_id for s in account.waiting)
            for priority in account.priorities:
                arrivals = [s.place[1] for s in account.waiting if s.request.priority == priority]
                assert arrivals == sorted(arrivals), "first come, first served is broken within a key and a priority"


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.place
