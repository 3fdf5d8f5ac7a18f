"""One replica as a gateway has it: its stream, and what it last said; and how long such things are waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ray.serve.handle import DeploymentResponseGenerator

from service.engine.stats import EngineHealth, EngineInfo
from service.wire import Item, Pulse, StepMessage

Call = DeploymentResponseGenerator[Item]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a gateway waits, in seconds: for a replica to take a request; for one to go on with a request that was
    lost, 0 for not at all; for the first one where there was none; and for one that says nothing, which they do every
    second.
    """

    replica_s: float = 10.0
    resume_s: float = 60.0
    wake_s: float = 120.0
    silence_s: float = 6.0


@dataclass(slots=True, eq=False)
class Link:
    """The stream from one replica."""

    replica: str
    info: EngineInfo
    stream: Call
    pulse: Pulse
    pulse_at_s: float = field(default_factory=time.monotonic)
    heard_at_s: float = field(default_factory=time.monotonic)

    def hear(self, message: StepMessage) -> None:
        self.heard_at_s = time.monotonic()
        if message.pulse is not None:
            self.pulse, self.pulse_at_s = message.pulse, self.heard_at_s

    @property
    def health(self) -> EngineHealth:
        return self.pulse.health

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.heard_at_s


def cancel(call: Call) -> None:
    call.cancel()  # type: ignore[no-untyped-call]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
