"""`tessera`, whose recording can be switched off: `python -m tests.service.unmetered serve --local --port 8000`.

SIGUSR1 puts nothing in the place of all that counts and times for metrics, the dashboard and `/debug/`; SIGUSR2 puts it
back. For measuring what recording costs, and for nothing else.
"""

from __future__ import annotations

import signal
from typing import Any

import service.engine.engine
from service.engine.meter import StepMeter
from service.gateway.history import History
from service.gateway.run import CompletionRun
from service.gateway.survey import Survey, Surveyor
from service.metrics import GatewayMetrics, PlainCounter, PlainHistogram


def _nothing(*_: object, **__: object) -> None:
    pass


async def _no_survey(*_: object, **__: object) -> Survey:
    return Survey([], None)


class Recording:
    """All that records in this process. Create it before any gateway."""

    def __init__(self) -> None:
        self._histograms: list[PlainHistogram] = []
        self._watch_histograms()
        self._recorders: list[tuple[Any, str, Any]] = [
            (StepMeter, "record", _nothing),
            (service.engine.engine, "StepRecord", _nothing),
            (service.engine.engine, "num_prompt_tokens", _nothing),
            (GatewayMetrics, "http_finished", _nothing),
            (GatewayMetrics, "rejected", _nothing),
            (CompletionRun, "_count", _nothing),
            (PlainCounter, "inc", _nothing),
            (History, "record", _nothing),
            (Surveyor, "survey", _no_survey),
        ]
        self._originals = [getattr(owner, name) for owner, name, _ in self._recorders]

    def stop(self) -> None:
        for owner, name, instead in self._recorders:
            setattr(owner, name, instead)
        for histogram in self._histograms:
            histogram.observe = _nothing

    def start(self) -> None:
        for (owner, name, _), original in zip(self._recorders, self._originals, strict=True):
            setattr(owner, name, original)
        for histogram in self._histograms:
            histogram.observe = histogram._tally.observe

    def _watch_histograms(self) -> None:
        """Those of `GatewayMetrics` are called through their instances, which have to be known."""
        create, histograms = PlainHistogram.__init__, self._histograms

        def create_and_remember(histogram: PlainHistogram, *arguments: Any) -> None:
            create(histogram, *arguments)
            histograms.append(histogram)

        PlainHistogram.__init__ = create_and_remember  # type: ignore


def main() -> None:
    recording = Recording()
    signal.signal(signal.SIGUSR1, lambda *_: recording.stop())
    signal.signal(signal.SIGUSR2, lambda *_: recording.start())
    from service.cli import main as tessera

    tessera()


if __name__ == "__main__":
    main()
