"""What counting costs, in microseconds of CPU time: `python -m tests.service.metrics_cost`."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.stats import EngineStats
from service.gateway.history import History
from service.gateway.survey import Survey
from service.metrics import GatewayMetrics, Phases
from tests.engine.scripted import make_engine, make_request, make_scheduler
from tests.gateway.fake_engine import INFO

BATCH = 8


def microseconds(function: Callable[[], object], num_calls: int) -> float:
    """The best of a few runs: what other processes do makes it only longer."""
    best = float("inf")
    for _ in range(7):
        started_s = time.process_time()
        for _ in range(num_calls):
            function()
        best = min(best, time.process_time() - started_s)
    return best / num_calls * 1e6


def step_cost() -> float:
    """Of one step that decodes for `BATCH` requests."""
    scheduler = make_scheduler(num_blocks=1024, max_num_seqs=BATCH, max_num_batched_tokens=64)
    engine = make_engine(scheduler)
    for number in range(BATCH):
        engine.add_request(make_request(f"r{number}", max_tokens=20, ignore_eos=True))
    outputs = [engine.step() for _ in range(4)][-1]
    plan = scheduler.schedule()

    def record() -> None:
        engine._record((time.monotonic(), time.monotonic(), time.monotonic()), plan, outputs)

    return microseconds(record, 5000)


def main() -> None:
    metrics, phases, history = GatewayMetrics(INFO, "", ""), Phases(0.1, 0.1, 0.1, 0.1, 0.1), History()

    def sample() -> None:
        history.record(Survey([metrics.families()], [EngineStats("0")]), time.monotonic())

    def tokens() -> None:
        for _ in range(1000):
            metrics.itl.observe(0.003)
            metrics.generation_tokens.inc(1)
        list(metrics.itl.collect())

    token = microseconds(tokens, 50) / 1000
    print(f"a step of {BATCH}: {step_cost():.2f} us")
    print(f"a token at the gateway: {token:.2f} us")
    print(f"a request: {microseconds(lambda: metrics.finished('stop', 10, 100, phases), 3000):.2f} us")
    print(f"a sample of the history, every two seconds: {microseconds(sample, 20):.0f} us")


if __name__ == "__main__":
    main()
