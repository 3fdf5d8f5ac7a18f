"""Who sends how many requests when, seen from the server."""

import asyncio
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter

import pytest

from loadtests.arrivals import poisson_arrivals
from loadtests.errors import WorkloadError
from loadtests.load import Measurement, run_load
from loadtests.plan import LoadPlan, default_num_requests
from loadtests.record import Phase, RequestRecord


@dataclass
class Sleeper:
    """Answers request i after `duration_s`, or never; remembers what was in flight."""

    duration_s: float = 0.02
    never: frozenset[int] = frozenset()
    failing: frozenset[int] = frozenset()
    started: list[tuple[int, Phase, float]] = field(default_factory=list)
    in_flight: set[int] = field(default_factory=set)
    most_in_flight: int = 0
    fewest_while_measuring: int = 10**9
    num_abandoned: int = 0
    _hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, index: int, phase: Phase, planned_s: float | None) -> RequestRecord:
        started_s = perf_counter()
        self.started.append((index, phase, started_s))
        self.in_flight.add(index)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        try:
            await asyncio.wait_for(self._hung_up.wait(), 60 if index in self.never else self.duration_s)
            error: str | None = "disconnected"
            self.num_abandoned += 1
        except TimeoutError:
            error = "http_503" if index in self.failing else None
        if phase is Phase.MEASURED:
            self.fewest_while_measuring = min(self.fewest_while_measuring, len(self.in_flight))
        self.in_flight.discard(index)
        return RequestRecord(index, phase, started_s, perf_counter() - started_s, error=error)

    def abandon(self) -> None:
        self._hung_up.set()


@dataclass
class Bell:
    """Remembers when the window opened and closed."""

    rung: list[tuple[str, float]] = field(default_factory=list)

    def open(self) -> None:
        self.rung.append(("open", perf_counter()))

    def close(self) -> None:
        self.rung.append(("close", perf_counter()))


async def run(plan: LoadPlan, sender: Sleeper, seed: int = 0) -> tuple[Measurement, Bell]:
    bell = Bell()
    return await asyncio.wait_for(run_load(plan, sender, bell, seed=seed), 60), bell


async def test_a_closed_loop_keeps_its_concurrency_until_the_last_answer() -> None:
    sender = Sleeper()
    measurement, bell = await run(LoadPlan(concurrency=4, num_requests=10, num_warmup=4), sender)
    assert sender.most_in_flight == 4
    assert sender.fewest_while_measuring == 4
    assert [record.index for record in measurement.measured] == list(range(4, 14))
    assert [name for name, _ in bell.rung] == ["open", "close"]
    assert not sender.in_flight
    fillers = [record for record in measurement.records if record.phase is Phase.FILLER]
    assert fillers
    assert {record.error for record in fillers if not record.is_success} <= {"disconnected"}


async def test_the_window_is_from_the_first_measured_request_to_the_last_answer() -> None:
    measurement, bell = await run(LoadPlan(concurrency=2, num_requests=6, num_warmup=2), Sleeper())
    starts = [record.started_s for record in measurement.measured]
    ends = [record.ended_s for record in measurement.measured]
    assert bell.rung[0][1] <= measurement.opened_s <= min(starts)
    assert max(ends) <= measurement.closed_s <= max(ends) + 0.05
    assert measurement.window_s == pytest.approx(3 * 0.02, abs=0.05)


async def test_a_duration_measures_what_was_sent_in_it() -> None:
    measurement, _ = await run(LoadPlan(concurrency=2, duration_s=0.3, num_warmup=2), Sleeper())
    opened_s = measurement.opened_s
    assert 8 <= len(measurement.measured) <= 31
    assert all(record.started_s <= opened_s + 0.3 for record in measurement.measured)
    assert measurement.window_s >= 0.28


async def test_arrivals_do_not_wait_for_answers() -> None:
    sender = Sleeper(duration_s=0.4)
    plan = LoadPlan(rate=100.0, num_requests=20, num_warmup=2)
    measurement, _ = await run(plan, sender, seed=3)
    assert len(measurement.measured) == 20
    assert sender.most_in_flight > 15
    starts = [time_s for _, _, time_s in sender.started[:22]]
    planned = list(islice(poisson_arrivals(100.0, 3), 22))
    for start, plan_s in zip(starts, planned, strict=True):
        assert start - starts[0] == pytest.approx(plan_s - planned[0], abs=0.05)


async def test_an_open_loop_without_end_is_bounded_and_says_so() -> None:
    sender = Sleeper(duration_s=0.5)
    measurement, _ = await run(LoadPlan(rate=200.0, num_requests=30, max_in_flight=5), sender)
    assert sender.most_in_flight == 5
    errors = [record.error for record in measurement.measured]
    assert errors.count(None) == 5
    assert errors.count("not_sent") == 25


async def test_a_server_that_refuses_is_not_hammered() -> None:
    sender = Sleeper(duration_s=0.001, failing=frozenset(range(1000)))
    measurement, _ = await run(LoadPlan(concurrency=1, duration_s=0.5), sender)
    assert len(measurement.measured) <= 6
    assert {record.error for record in measurement.measured} == {"http_503"}


async def test_a_request_without_answer_ends_with_the_cell() -> None:
    sender = Sleeper(never=frozenset({3}))
    measurement, bell = await run(LoadPlan(concurrency=2, num_requests=6, max_cell_s=0.5), sender)
    by_index = {record.index: record for record in measurement.measured}
    assert sorted(by_index) == list(range(6))
    assert by_index[3].error == "disconnected"
    assert bell.rung[-1][0] == "close"


async def test_a_warm_up_without_end_measures_nothing() -> None:
    measurement, bell = await run(
        LoadPlan(concurrency=1, num_requests=1, num_warmup=1, max_cell_s=0.2), Sleeper(never=frozenset({0}))
    )
    assert measurement.measured == []
    assert measurement.window_s == 0
    assert bell.rung == []


async def test_a_fault_of_the_client_is_not_swallowed() -> None:
    class Broken(Sleeper):
        async def send(self, index: int, phase: Phase, planned_s: float | None) -> RequestRecord:
            raise RuntimeError("a bug")

    with pytest.raises(ExceptionGroup):
        await run(LoadPlan(concurrency=2, num_requests=2), Broken())


@pytest.mark.parametrize(
    "fields",
    [
        {"concurrency": 0, "num_requests": 1},
        {"concurrency": 2000, "num_requests": 1},
        {"concurrency": 1, "rate": 1.0, "num_requests": 1},
        {"num_requests": 1},
        {"concurrency": 1},
        {"concurrency": 1, "num_requests": 1, "duration_s": 1.0},
        {"rate": 0.0, "num_requests": 1},
        {"rate": float("nan"), "num_requests": 1},
        {"concurrency": 1, "num_requests": 10**9},
        {"concurrency": 1, "duration_s": 1e9},
    ],
)
def test_loads_without_bounds_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(WorkloadError):
        LoadPlan(**fields)  # type: ignore[arg-type]


def test_the_default_is_full_rounds() -> None:
    assert [default_num_requests(concurrency) for concurrency in (1, 8, 32)] == [8, 32, 128]
