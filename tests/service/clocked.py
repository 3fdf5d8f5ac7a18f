"""`tessera`, each of whose recording calls is clocked: `python -m tests.service.clocked serve --local --port 8000`.

SIGUSR1 begins anew; SIGUSR2 prints, as a line of JSON, how often each was called since and the median of its
microseconds, those of other clocked calls within it and of the clock itself left out.
"""

from __future__ import annotations

import json
import signal
import statistics
import threading
from collections.abc import Callable
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from service.engine import scheduler
from service.engine.async_engine import AsyncEngine
from service.engine.engine import Engine
from service.engine.meter import StepMeter
from service.gateway import probes
from service.gateway.history import History
from service.gateway.run import CompletionRun
from service.metrics import GatewayMetrics

# What records, and what for.
POINTS: tuple[tuple[str, Any, str], ...] = (
    ("a step, noted", Engine, "_record"),
    ("some steps, booked", StepMeter, "_book"),
    ("a request, as the engine keeps it", scheduler, "record_of"),
    ("a request", CompletionRun, "_count"),
    ("an HTTP exchange", GatewayMetrics, "http_finished"),
    ("the engine's statistics", AsyncEngine, "stats"),
    ("the gateway's samples", GatewayMetrics, "families"),
    ("a sample of the history", History, "record"),
    ("a scrape, written", probes, "render"),
)
INSTRUMENTS = (
    ("a gap between tokens", "itl", "observe"),
    ("tokens, counted", "generation_tokens", "inc"),
    ("a first token", "ttft", "observe"),
    ("a prompt", "prompt_tokens", "inc"),
)


class Clock:
    """Clocks calls by name."""

    def __init__(self) -> None:
        self._within = threading.local()
        self._durations_s: dict[str, list[float]] = {}
        self._watch_gateways()
        for name, owner, attribute in POINTS:
            setattr(owner, attribute, self.of(name, getattr(owner, attribute)))

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        note, within = self._durations_s.setdefault(name, []).append, self._within

        def clocked(*arguments: Any, **named: Any) -> Any:
            outer_s = getattr(within, "seconds", 0.0)
            within.seconds = 0.0
            began_s = perf_counter()
            result = function(*arguments, **named)
            took_s = perf_counter() - began_s
            note(took_s - within.seconds)
            within.seconds = outer_s + took_s
            return result

        return clocked

    def clear(self) -> None:
        for durations_s in self._durations_s.values():
            durations_s.clear()

    def tell(self) -> None:
        found = {name: list(durations_s) for name, durations_s in self._durations_s.items() if durations_s}
        nothing = self.of("nothing", lambda *_: None)
        for _ in range(1000):
            nothing(0.0)
        own_s = statistics.median(self._durations_s.pop("nothing"))
        medians = {name: (len(all_s), 1e6 * (statistics.median(all_s) - own_s)) for name, all_s in found.items()}
        print(json.dumps(medians), flush=True)

    def _watch_gateways(self) -> None:
        create = GatewayMetrics.__init__

        def create_and_watch(metrics: GatewayMetrics, *arguments: Any) -> None:
            create(metrics, *arguments)
            for name, instrument, call in INSTRUMENTS:
                function = getattr(getattr(metrics, instrument), call)
                setattr(metrics, instrument, SimpleNamespace(**{call: self.of(name, function)}))

        GatewayMetrics.__init__ = create_and_watch  # type: ignore


def main() -> None:
    clock = Clock()
    signal.signal(signal.SIGUSR1, lambda *_: clock.clear())
    signal.signal(signal.SIGUSR2, lambda *_: clock.tell())
    from service.cli import main as tessera

    tessera()


if __name__ == "__main__":
    main()
