"""The bounds of the queue: in all, for each key, and the measured time after which it is worth coming back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.admission import Admission, QueueLimits
from service.engine.drain_rate import DrainRate
from service.engine.errors import EngineOverloadedError, KeyOverloadedError
from service.engine.request import Request, SamplingParams


def request(number: int, key: str = "", num_tokens: int = 2) -> Request:
    return Request(f"r{number}", (1,), SamplingParams(max_tokens=num_tokens - 1), key_id=key)


class Queue:
    """An admission and the requests that it accepted; the first `max_num_running` run, in the order of arrival."""

    def __init__(self, limits: QueueLimits) -> None:
        self.now_s = 100.0
        self.limits = limits
        self.live: list[Request] = []
        self.admission = Admission(limits, lambda: self.running, lambda: self.now_s)
        self.num_asked = 0

    @property
    def running(self) -> list[Request]:
        return self.live[: self.limits.max_num_running]

    @property
    def waiting(self) -> list[Request]:
        return self.live[self.limits.max_num_running :]

    def ask(self, key: str = "", num_tokens: int = 2) -> None:
        self.num_asked += 1
        new = request(self.num_asked, key, num_tokens)
        self.admission.accept(new)
        self.live.append(new)

    def end(self, index: int = 0) -> None:
        self.admission.end(self.live.pop(index).request_id)

    def flow(self, num_times: int, period_s: float, num_tokens: int = 2) -> None:
        """So many times the first ends after a while, and another comes."""
        for _ in range(num_times):
            self.now_s += period_s
            self.end()
            self.ask(num_tokens=num_tokens)

    def fill(self, key: str = "", num_tokens: int = 2) -> EngineOverloadedError:
        """Asks until it is refused."""
        for _ in range(10_000):
            try:
                self.ask(key, num_tokens)
            except EngineOverloadedError as error:
                return error
        raise AssertionError("never refused")


def test_without_keys_the_queue_is_filled_to_its_bound() -> None:
    queue = Queue(QueueLimits(2, 8, 1000))
    error = queue.fill()
    assert not isinstance(error, KeyOverloadedError)
    assert (len(queue.running), len(queue.waiting)) == (2, 8)
    assert "10 requests are running or waiting" in str(error)


def test_without_a_queue_what_can_run_is_taken() -> None:
    queue = Queue(QueueLimits(4, 0, 1))
    queue.fill("k", num_tokens=50)
    assert len(queue.live) == 4


def test_tokens_are_bounded_but_one_may_always_wait() -> None:
    queue = Queue(QueueLimits(1, 100, 50))
    assert "tokens wait" in str(queue.fill(num_tokens=20))
    assert len(queue.waiting) == 2
    queue = Queue(QueueLimits(1, 100, 50))
    queue.fill(num_tokens=400)
    assert len(queue.waiting) == 1


def test_a_key_leaves_room_for_others() -> None:
    queue = Queue(QueueLimits(2, 30, 10_000))
    assert isinstance(queue.fill("a"), KeyOverloadedError)
    assert len(queue.waiting) == 15
    queue.ask("b")
    queue.fill("b")
    queue.ask("c")
    assert isinstance(queue.fill("a"), KeyOverloadedError)


def test_a_key_leaves_tokens_for_others() -> None:
    queue = Queue(QueueLimits(2, 1000, 400))
    assert isinstance(queue.fill("a", num_tokens=20), KeyOverloadedError)
    assert len(queue.waiting) == 10
    queue.ask("b", num_tokens=100)


steps = st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(2, 60), st.booleans()), max_size=80)


@given(steps=steps, running=st.integers(1, 4), waiting=st.integers(0, 12), tokens=st.integers(1, 300))
def test_bounds_hold_whatever_comes(
    steps: list[tuple[str, int, bool]], running: int, waiting: int, tokens: int
) -> None:
    queue = Queue(QueueLimits(running, waiting, tokens))
    for key, num_tokens, ends in steps:
        had_a_key_waiting = any(r.key_id == key for r in queue.waiting)
        num_free = waiting - len(queue.waiting)
        free_tokens = tokens - sum(r.max_num_tokens for r in queue.waiting)
        try:
            queue.ask(key, num_tokens)
        except KeyOverloadedError:
            assert key
            assert had_a_key_waiting, "a key with nothing waiting is refused for its own sake"
        except EngineOverloadedError:
            assert len(queue.live) >= running
            assert num_free <= 0 or (num_tokens > free_tokens and queue.waiting)
        assert len(queue.waiting) <= waiting
        assert len(queue.waiting) <= 1 or sum(r.max_num_tokens for r in queue.waiting) <= tokens
        if ends and queue.live:
            queue.end()


def test_retry_after_is_measured_and_idle_time_does_not_count() -> None:
    queue = Queue(QueueLimits(1, 1, 1000))
    assert queue.fill().retry_after_s == 1.0, "nothing is known yet"
    queue.flow(20, 3.0)
    assert queue.fill().retry_after_s == pytest.approx(3.0)
    queue.end()
    queue.end()
    queue.now_s += 1e6
    assert queue.fill().retry_after_s == pytest.approx(3.0, rel=0.1)


def test_those_refused_stand_in_a_line_that_moves_on() -> None:
    queue = Queue(QueueLimits(1, 9, 1000))
    queue.fill()
    queue.flow(20, 3.0)
    told = [queue.fill().retry_after_s for _ in range(30)]
    assert told == pytest.approx([min(3.0 * place, 30.0) for place in range(1, 31)])
    queue.now_s += 30 * 3.0
    for _ in range(10):
        queue.end()
    assert queue.fill().retry_after_s == pytest.approx(queue.admission.seconds_per_request), "the line has gone home"


def test_a_flood_of_refusals_is_forgotten() -> None:
    queue = Queue(QueueLimits(2, 8, 1000))
    queue.fill()
    for _ in range(4):
        queue.now_s += 1.0
        queue.end()
        queue.fill()
    per_place = queue.admission.seconds_per_request
    for _ in range(5000):
        assert queue.fill().retry_after_s <= 10 * per_place + 1e-9
    queue.now_s += 10 * per_place
    assert queue.fill().retry_after_s == pytest.approx(queue.admission.seconds_per_request)


def test_retry_after_counts_tokens_where_tokens_are_short() -> None:
    queue = Queue(QueueLimits(1, 100, 100))
    queue.fill(num_tokens=50)
    queue.flow(10, 2.0, num_tokens=50)
    with pytest.raises(EngineOverloadedError) as caught:
        queue.ask(num_tokens=100)
    assert caught.value.retry_after_s == pytest.approx(2.0 * 100 / 50)


@given(
    events=st.lists(st.tuples(st.floats(0, 100), st.sampled_from(["busy", "idle", "ended"])), max_size=200),
    num=st.integers(1, 5),
)
def test_the_rate_is_finite_and_grows_with_what_is_asked(events: list[tuple[float, str]], num: int) -> None:
    now = [0.0]
    rate = DrainRate(lambda: now[0])
    for after_s, event in events:
        now[0] += after_s
        rate.ended(3) if event == "ended" else getattr(rate, event)()
        assert 0 <= rate.seconds_until(num, 0) <= rate.seconds_until(num + 1, 0)
        assert rate.seconds_until(0, num) <= rate.seconds_until(0, num + 1) < 1e9


def test_a_request_accepted_elsewhere_is_never_refused_for_want_of_room() -> None:
    queue = Queue(QueueLimits(2, 2, 20))
    queue.fill("a")
    for number in range(3):
        queue.admission.accept(replace(request(100 + number, "a"), is_resumed=True))
    with pytest.raises(EngineOverloadedError):
        queue.ask("b")
    for number in range(3):
        queue.admission.end(f"r{100 + number}")
    queue.end()
    queue.ask("b")
