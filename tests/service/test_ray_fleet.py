"""What a gateway knows of its fleet while the controller says nothing."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from service.engine.stats import Fleet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


async def test_a_controller_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from service import ray_fleet

    answers = threading.Event()
    asked = []

    def ask(*names: str) -> Fleet:
        asked.append(names)
        answers.wait(60)
        return Fleet(0, 0)

    monkeypatch.setattr(ray_fleet, "_ask", ask)
    monkeypatch.setattr(ray_fleet, "_ANSWER_TIMEOUT_S", 0.05)
    watch = ray_fleet.FleetWatch("app", "Engine", wake_timeout_s=10)
    async with asyncio.timeout(60):
        for _ in range(3):
            await watch.look()
        assert asked == [("app", "Engine")], "one question at a time"
        assert watch.fleet is None
        assert not watch.is_asleep
        answers.set()
        while watch.fleet is None:
            await asyncio.sleep(0.01)
        await watch.look()
    assert len(asked) == 2
    assert watch.is_asleep


async def test_what_was_known_outlives_a_controller_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from service import ray_fleet

    answers: list[Fleet | Exception] = [Fleet(2, 1), RuntimeError("away")]

    def ask(*_: str) -> Fleet:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_fleet, "_ask", ask)
    watch = ray_fleet.FleetWatch("app", "Engine", wake_timeout_s=10)
    for _ in range(2):
        await watch.look()
        assert watch.fleet == Fleet(2, 1)
    assert not watch.is_asleep


def test_a_woken_fleet_is_asleep_until_it_is_up_or_its_time_is_over() -> None:
    from service.ray_fleet import FleetWatch

    watch = FleetWatch("app", "Engine", wake_timeout_s=0.2)
    assert watch.wake() == pytest.approx(0.2, abs=0.1)
    assert watch.is_asleep
    watch.is_up()
    assert not watch.is_asleep
    watch.wake()
    time.sleep(0.25)
    assert not watch.is_asleep
