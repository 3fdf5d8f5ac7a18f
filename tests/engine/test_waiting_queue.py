"""The order of waiting requests, against slow references and the bounds that its documentation promises."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.request import Request, SamplingParams
from service.engine.sequence import Sequence
from service.engine.waiting_queue import PRIORITY_TOKENS, WaitingQueue
from tests.engine.scripted import make_engine, make_scheduler

WEIGHTS = (1, 2, 5)  # which divide the queue's unit, so that a reference in fractions agrees to the last token


def weight_of(key: str) -> int:
    return WEIGHTS[ord(key[0]) % 3] if key else 1


def sequence(name: object, key: str = "", *, prompt: int = 1, max_tokens: int = 1, priority: int = 0) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(
        Request(str(name), (1,) * prompt, sampling, priority=priority, key_id=key, weight=weight_of(key)), 0.0
    )


operations = st.lists(st.sampled_from(["append", "take", "put back", "remove"]), max_size=40)


@given(operations=operations, data=st.data())
def test_one_key_is_first_come_first_served(operations: list[str], data: st.DataObject) -> None:
    queue, reference, admitted = WaitingQueue(), deque[Sequence](), list[Sequence]()
    for number, operation in enumerate(operations):
        if operation == "append":
            reference.append(sequence(number, prompt=data.draw(st.integers(1, 9))))
            queue.append(reference[-1])
        elif operation == "take" and reference:
            admitted.append(queue.take())
            assert admitted[-1] is reference.popleft()
            queue.charge(admitted[-1], 7)
        elif operation == "put back" and admitted:
            reference.appendleft(admitted[-1])
            queue.put_back(admitted.pop())
        elif operation == "remove" and reference:
            victim = data.draw(st.sampled_from(list(reference)))
            reference.remove(victim)
            queue.remove(victim)
            queue.forget(victim)
        queue.check_integrity()
        assert queue.head is (reference[0] if reference else None)
        assert list(queue) == list(reference)
        assert len(queue) == len(reference)


class NaiveQueue:
    """The same policy, written down as its documentation says it, from a log of all that happened."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.before: dict[str, int] = {}  # tokens of the same key that came before, by request
        self.came: dict[str, int] = {}  # tokens that ever came, by key
        self.given: dict[str, Fraction] = {}
        self.last_key = ""

    def of(self, key: str) -> list[Sequence]:
        waiting = [s for s in self.waiting if s.request.key_id == key]
        return sorted(waiting, key=lambda s: self.before[s.request_id] + s.request.priority * PRIORITY_TOKENS)

    def floor(self) -> Fraction:
        keys = {s.request.key_id for s in self.waiting} or {self.last_key}
        return min(self.given.get(key, Fraction(0)) for key in keys)

    def append(self, new: Sequence) -> None:
        key = new.request.key_id
        if not self.of(key):
            self.given[key] = max(self.given.get(key, Fraction(0)), self.floor())
        self.before[new.request_id] = self.came.get(key, 0)
        self.came[key] = self.came.get(key, 0) + new.request.max_num_tokens
        self.waiting.append(new)

    def head(self) -> Sequence | None:
        def rank(key: str) -> tuple[Fraction, int]:
            most_urgent = min(s.request.priority for s in self.of(key))
            return self.given[key] + most_urgent * PRIORITY_TOKENS, int(self.of(key)[0].request_id)

        keys = {s.request.key_id for s in self.waiting}
        return self.of(min(keys, key=rank))[0] if keys else None

    def remove(self, old: Sequence) -> None:
        self.waiting.remove(old)
        self.last_key = old.request.key_id

    def charge(self, s: Sequence, num_tokens: int) -> None:
        self.given[s.request.key_id] += Fraction(num_tokens, s.request.weight)


@settings(deadline=None)
@given(operations=operations, data=st.data())
def test_it_is_the_policy_that_is_written_down(operations: list[str], data: st.DataObject) -> None:
    # One request runs for ever, so that no key's past is forgotten.
    queue, naive = WaitingQueue(), NaiveQueue()
    anchor = sequence(10**6, "z")
    for each in (queue, naive):
        each.append(anchor)
    naive.remove(queue.take())
    admitted: list[Sequence] = []
    for number, operation in enumerate(operations):
        if operation == "append":
            key = data.draw(st.sampled_from("abc"))
            cost = data.draw(st.sampled_from([1, 10, PRIORITY_TOKENS // 2, PRIORITY_TOKENS * 2]))
            new = sequence(number, key, max_tokens=cost, priority=data.draw(st.integers(-1, 1)))
            queue.append(new)
            naive.append(new)
        elif operation == "take" and queue.head:
            taken = queue.take()
            naive.remove(taken)
            for each in (queue, naive):
                each.charge(taken, taken.request.max_num_tokens)
            admitted.append(taken)
        elif operation == "remove" and queue.head:
            victim = data.draw(st.sampled_from(list(queue)))
            queue.remove(victim)
            queue.forget(victim)
            naive.remove(victim)
        elif operation == "put back" and admitted:  # here: ends
            queue.forget(admitted.pop())
        queue.check_integrity()
        assert queue.head is naive.head()


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 2 * PRIORITY_TOKENS), st.integers(-2, 2), st.booleans()), min_size=2, max_size=30
    )
)
def test_nobody_is_overtaken_for_ever_within_a_key(requests: list[tuple[int, int, bool]]) -> None:
    """A request lets later ones pass only while what came in between is within its distance in priority."""
    queue = WaitingQueue()
    arrived: list[tuple[Sequence, int]] = []
    num_tokens = 0
    for number, (max_tokens, priority, takes) in enumerate(requests):
        new = sequence(number, "a", max_tokens=max_tokens, priority=priority)
        queue.append(new)
        arrived.append((new, num_tokens))
        num_tokens += new.request.max_num_tokens
        if takes:
            taken = queue.take()
            at = next(at for s, at in arrived if s is taken)
            arrived.remove((taken, at))
            for waiting, since in arrived:
                distance = (waiting.request.priority - taken.request.priority) * PRIORITY_TOKENS
                assert since > at or at - since < distance or waiting is taken


@dataclass
class Flood:
    """A key that has a request waiting whenever it is asked."""

    key: str
    priority: int
    cost: int
    given: int = 0


floods = st.lists(
    st.tuples(
        st.integers(-2, 2), st.integers(PRIORITY_TOKENS // 8, PRIORITY_TOKENS), st.integers(0, 3 * PRIORITY_TOKENS)
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(floods=floods, priority=st.integers(-2, 2))
def test_no_flood_starves_another_key(floods: list[tuple[int, int, int]], priority: int) -> None:
    """However many requests others keep waiting, and however urgent they call them: what they are given first is
    bounded by their weight times the distance in priority, and a request each.
    """
    queue = WaitingQueue()
    others = [Flood("abcd"[i], p, cost) for i, (p, cost, _) in enumerate(floods)]
    for other, (_, _, debt) in zip(others, floods, strict=True):
        for number in range(2):
            queue.append(sequence(number, other.key, max_tokens=other.cost, priority=other.priority))
        queue.charge(sequence("past", other.key), debt)
    queue.append(sequence("mine", "m", priority=priority))
    by_key = {other.key: other for other in others}
    limits = {o.key: max(priority - o.priority, 0) * PRIORITY_TOKENS * weight_of(o.key) + o.cost + 1 for o in others}
    while (taken := queue.take()).request_id != "mine":
        other = by_key[taken.request.key_id]
        queue.charge(taken, taken.request.max_num_tokens)
        other.given += taken.request.max_num_tokens
        assert other.given <= limits[other.key]
        queue.append(sequence(2, other.key, max_tokens=other.cost, priority=other.priority))


lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(loads=st.lists(lengths, min_size=2, max_size=3), num_blocks=st.integers(8, 16), num_seqs=st.integers(1, 4))
def test_keys_that_wait_get_tokens_by_weight_and_nothing_lies_idle(
    loads: list[list[tuple[int, int]]], num_blocks: int, num_seqs: int
) -> None:
    """Whatever the lengths: a key is ahead of another that waits by no more than what one choice can bring it: the
    longest prompt and what may be running of it at once, over its weight.
    """
    engine = make_engine(make_scheduler(num_blocks=num_blocks, max_num_seqs=num_seqs, max_num_batched_tokens=64))
    scheduler = engine.scheduler
    for number in range(12):
        for key, load in zip("abc", loads, strict=False):
            if number < len(load):
                prompt, max_tokens = load[number]
                request = sequence(f"{key}{number}", key, prompt=prompt, max_tokens=max_tokens).request
                own = 12 * "abc".index(key) + number  # no text begins like another, so that all is computed
                engine.add_request(replace(request, prompt_token_ids=(own,) * prompt))
    given: dict[str, Fraction] = dict.fromkeys("abc"[: len(loads)], Fraction(0))
    admitted: set[str] = set()
    while scheduler.has_work:
        num_preemptions = scheduler.num_preemptions
        plan = scheduler.schedule()
        admitted |= {running.request_id for running in scheduler.running}
        head = scheduler.waiting.head
        if head is not None and scheduler.num_preemptions == num_preemptions:
            is_full = len(scheduler.running) == num_seqs or plan.num_tokens == scheduler.config.max_num_batched_tokens
            assert is_full or not scheduler.blocks.can_grow(head, head.num_tokens)
        for output in scheduler.update_from_output(plan, engine.runner.execute(plan)):
            key = output.request_id[0]
            given[key] += Fraction(len(output.new_token_ids), weight_of(key))
        scheduler.check_integrity()
        _assert_fair(scheduler.waiting, given, admitted, loads, num_seqs)


def _assert_fair(
    queue: WaitingQueue,
    decoded: dict[str, Fraction],
    admitted: set[str],
    loads: list[list[tuple[int, int]]],
    num_seqs: int,
) -> None:
    waiting = {s.request.key_id for s in queue if s.seniority is None}
    given = {}
    for key, load in zip("abc", loads, strict=False):
        prompts = sum(prompt for number, (prompt, _) in enumerate(load) if f"{key}{number}" in admitted)
        given[key] = decoded[key] + Fraction(prompts, weight_of(key))
    for ahead in waiting:
        for behind in waiting:
            most = 20 + num_seqs * 12
            assert given[ahead] - given[behind] <= Fraction(most, weight_of(ahead))


def test_a_key_ten_times_as_busy_gets_no_more() -> None:
    """Two keys, one slot: the busy one has all of its requests there before the other's first."""
    engine = make_engine(make_scheduler(max_num_seqs=1))
    for number in range(40):
        engine.add_request(sequence(f"a{number}", "d", prompt=4, max_tokens=4).request)
    for number in range(4):
        engine.add_request(sequence(f"b{number}", "g", prompt=4, max_tokens=4).request)  # of the same weight
    ends = []
    while len([name for name in ends if name[0] == "b"]) < 4:
        ends += [output.request_id for output in engine.step() if output.is_finished]
    assert len(ends) <= 2 * 4 + 2


def test_what_the_cache_spares_is_not_charged() -> None:
    engine = make_engine(make_scheduler(max_num_batched_tokens=32))
    for name in ("first", "then", "other"):
        engine.add_request(sequence(name, "d", prompt=13, max_tokens=1).request)
    engine.add_request(sequence("holds", "g", prompt=1, max_tokens=30).request)
    weight, charged = weight_of("d"), []
    while len(engine.scheduler.running) or not charged:
        engine.step()
        charged += [a.service for a in engine.scheduler.waiting.accounts if a.key_id == "d"]
    num_computed = engine.runner.num_computed  # type: ignore[attr-defined]
    expected = sum(num_computed[name] for name in ("first", "then", "other")) + 3
    assert expected < 3 * 14, "nothing was shared"
    assert charged[-1] == expected * 1_000_000 // weight


def test_taking_from_an_empty_queue_is_an_error() -> None:
    with pytest.raises(IndexError, match="nothing waits"):
        WaitingQueue().take()


def test_a_debt_outlives_the_requests_that_made_it() -> None:
    queue = WaitingQueue()
    for name, key in enumerate(("d", "waits", "waits")):
        queue.append(sequence(name, key))
    taken = queue.take()
    queue.charge(taken, 100)
    queue.forget(taken)
    for name, key in enumerate(("new", "d", "new"), start=3):
        queue.append(sequence(name, key))
    assert [queue.take().request.key_id for _ in range(5)] == ["waits", "waits", "new", "new", "d"]


def test_what_was_not_asked_for_is_not_owed() -> None:
    queue = WaitingQueue()
    for number in range(3):
        queue.append(sequence(number, "d"))
    for _ in range(2):
        queue.charge(queue.take(), 100)
    for number in range(3, 6):
        queue.append(sequence(number, "g"))  # of the same weight, and late
        queue.append(sequence(number + 10, "d"))
    order = []
    while queue.head:
        order.append(queue.take())
        queue.charge(order[-1], 10)
    assert [s.request.key_id for s in order] == ["d", "g", "d", "g", "d", "g", "d"]
