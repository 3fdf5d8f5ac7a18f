"""`tessera`, whose recording can be switched off: `python -m tests.service.unmetered 10 serve --local --port 8000`.

SIGUSR1 puts nothing in the place of all that counts and times for metrics, the dashboard and `/debug/`; SIGUSR2 puts it
back, each call made as often as the first argument says, and the dashboard's history sampled that much more often. For
measuring what recording costs, and for nothing else.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from service.engine.engine import Engine
from service.gateway import history
from service.gateway.run import CompletionRun
from service.gateway.survey import Survey, Surveyor
from service.metrics import GatewayMetrics

# What is called at every step or token: its arguments. The others may be called more slowly.
OFTEN = {"_record": "engine, times_s, plan, outputs", "observe": "value", "inc": "amount=1"}
# What a gateway's metrics record outside of what is repeated as a whole.
OBSERVED = ("itl", "ttft")
COUNTED = ("generation_tokens", "prompt_tokens", "resumptions", "cancelled")


def _nothing(*_: object, **__: object) -> None:
    pass


async def _no_survey(*_: object, **__: object) -> Survey:
    return Survey([], None)


def _repeated(name: str, function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Calls `function` `times` over. What is called often is written out, since a loop and passing on any arguments
    would take longer than a value that goes into a list.
    """
    if name not in OFTEN:

        def repeat(*arguments: Any, **named: Any) -> Any:
            for _ in range(times - 1):
                function(*arguments, **named)
            return function(*arguments, **named)

        return repeat
    arguments = ", ".join(argument.partition("=")[0] for argument in OFTEN[name].split(", "))
    calls = f"\n    function({arguments})" * times
    scope: dict[str, Any] = {"function": function}
    exec(f"def repeat({OFTEN[name]}):{calls}", scope)
    repeat_often: Callable[..., Any] = scope["repeat"]
    return repeat_often


class Recording:
    """All that records in this process, `times` for once. Create it before any gateway."""

    def __init__(self, times: int) -> None:
        self._times = times
        self._is_on = True
        self._recorders: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []
        for owner, name in (
            (Engine, "_record"),
            (GatewayMetrics, "http_finished"),
            (GatewayMetrics, "rejected"),
            (CompletionRun, "_count"),
        ):
            self._add(owner, name, _nothing, _repeated(name, getattr(owner, name), times))
        # Not repeated but done more often.
        self._add(history.History, "record", _nothing, history.History.record)
        self._add(Surveyor, "survey", _no_survey, Surveyor.survey)
        history.PERIOD_S /= times
        self._watch_gateways()

    def switch(self, *, is_on: bool) -> None:
        self._is_on = is_on
        for owner, name, off, on in self._recorders:
            setattr(owner, name, on if is_on else off)

    def _add(self, owner: Any, name: str, off: Callable[..., Any], on: Callable[..., Any]) -> None:
        self._recorders.append((owner, name, off, on))
        setattr(owner, name, on if self._is_on else off)

    def _watch_gateways(self) -> None:
        """What they record themselves is called through their instruments, which have to be known."""
        create = GatewayMetrics.__init__

        def create_and_watch(metrics: GatewayMetrics, *arguments: Any) -> None:
            create(metrics, *arguments)
            for names, call in ((OBSERVED, "observe"), (COUNTED, "inc")):
                for name in names:
                    function = getattr(getattr(metrics, name), call)
                    setattr(metrics, name, stand_in := SimpleNamespace())
                    self._add(stand_in, call, _nothing, _repeated(call, function, self._times))

        GatewayMetrics.__init__ = create_and_watch  # type: ignore


def main() -> None:
    recording = Recording(int(sys.argv.pop(1)))
    signal.signal(signal.SIGUSR1, lambda *_: recording.switch(is_on=False))
    signal.signal(signal.SIGUSR2, lambda *_: recording.switch(is_on=True))
    from service.cli import main as tessera

    tessera()


if __name__ == "__main__":
    main()
