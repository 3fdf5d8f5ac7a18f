"""`tessera`, whose recording can be switched off: `python -m tests.service.unmetered 10 serve --local --port 8000`.

SIGUSR1 puts nothing in the place of all that counts and times for metrics, the dashboard and `/debug/`; SIGUSR2 puts it
back, each call made as often as the first argument says. For measuring what recording costs, and for nothing else.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from service.engine.engine import Engine
from service.gateway.history import History
from service.gateway.run import CompletionRun
from service.gateway.survey import Survey, Surveyor
from service.metrics import GatewayMetrics, PlainCounter, PlainHistogram


def _nothing(*_: object, **__: object) -> None:
    pass


async def _no_survey(*_: object, **__: object) -> Survey:
    return Survey([], None)


class _Repetition:
    """Makes every call `times` over, but not those that a repeated call makes in turn."""

    def __init__(self, times: int) -> None:
        self.times = times
        self._is_within = False

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """For functions of one thread, the event loop's."""

        def repeat(*arguments: Any, **named: Any) -> Any:
            if self._is_within:
                return function(*arguments, **named)
            self._is_within = True
            for _ in range(self.times - 1):
                function(*arguments, **named)
            result = function(*arguments, **named)
            self._is_within = False
            return result

        return repeat

    def of_engine(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """For what the engine's thread calls."""

        def repeat(*arguments: Any, **named: Any) -> Any:
            for _ in range(self.times - 1):
                function(*arguments, **named)
            return function(*arguments, **named)

        return repeat

    def of_survey(self, survey: Callable[..., Awaitable[Survey]]) -> Callable[..., Awaitable[Survey]]:
        async def repeat(*arguments: Any, **named: Any) -> Survey:
            for _ in range(self.times - 1):
                await survey(*arguments, **named)
            return await survey(*arguments, **named)

        return repeat


class Recording:
    """All that records in this process, `times` for once. Create it before any gateway."""

    def __init__(self, times: int) -> None:
        self._histograms: list[PlainHistogram] = []
        self._watch_histograms()
        self._repetition = repetition = _Repetition(times)
        self._recorders: list[tuple[Any, str, Any, Callable[..., Any]]] = [
            (owner, name, instead, repeat(getattr(owner, name)))
            for owner, name, instead, repeat in (
                (Engine, "_record", _nothing, repetition.of_engine),
                (GatewayMetrics, "http_finished", _nothing, repetition.of),
                (GatewayMetrics, "rejected", _nothing, repetition.of),
                (CompletionRun, "_count", _nothing, repetition.of),
                (PlainCounter, "inc", _nothing, repetition.of),
                (History, "record", _nothing, repetition.of),
                (Surveyor, "survey", _no_survey, repetition.of_survey),
            )
        ]

    def stop(self) -> None:
        for owner, name, instead, _ in self._recorders:
            setattr(owner, name, instead)
        for histogram in self._histograms:
            histogram.observe = _nothing

    def start(self) -> None:
        for owner, name, _, repeated in self._recorders:
            setattr(owner, name, repeated)
        for histogram in self._histograms:
            histogram.observe = self._repetition.of(histogram._observed.append)

    def _watch_histograms(self) -> None:
        """Those of `GatewayMetrics` are called through their instances, which have to be known."""
        create, histograms = PlainHistogram.__init__, self._histograms

        def create_and_remember(histogram: PlainHistogram, *arguments: Any) -> None:
            create(histogram, *arguments)
            histograms.append(histogram)

        PlainHistogram.__init__ = create_and_remember  # type: ignore


def main() -> None:
    recording = Recording(int(sys.argv.pop(1)))
    recording.start()
    signal.signal(signal.SIGUSR1, lambda *_: recording.stop())
    signal.signal(signal.SIGUSR2, lambda *_: recording.start())
    from service.cli import main as tessera

    tessera()


if __name__ == "__main__":
    main()
