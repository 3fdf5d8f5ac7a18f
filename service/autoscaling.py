"""How many engine replicas there should be: by the tokens still to be computed and the speed measured, not by requests.

Pure arithmetic; knows no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Of what replicas can compute, so much may be used before there should be one more: the rest is for what comes at once.
TARGET_USE = 0.8


@dataclass(frozen=True, slots=True)
class Scaling:
    """Bounds and pace of the number of replicas. Times are seconds.

    `target_backlog_s` is how much work, at its measured speed, each replica may have before there should be more of
    them. With `min_replicas` 0 the last one goes when nothing was asked for during `downscale_delay_s`.
    """

    min_replicas: int
    max_replicas: int
    initial_replicas: int
    target_backlog_s: float = 10.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas ({self.initial_replicas}) must be between min_replicas ({self.min_replicas}) and "
                f"max_replicas ({self.max_replicas})"
            )


@dataclass(frozen=True, slots=True)
class Load:
    """One replica: how long full batches take for all it has to do, and which share of it was used lately."""

    backlog_s: float
    use: float


def wanted_replicas(loads: Iterable[Load], target_backlog_s: float) -> float:
    """How many replicas all of this is for, as a fraction; 0 where nothing was to do.

    What has piled up tells of a burst at once, and how large it is. What is used tells whether the present number is
    needed when nothing piles up: without it a second replica that does its share would seem to be for nothing.
    """
    loads = list(loads)
    return max(sum(load.backlog_s for load in loads) / target_backlog_s, sum(load.use for load in loads) / TARGET_USE)


class UseMeter:
    """From a growing count of work, in seconds, to the share used since the last time it was asked."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def share(self, work_s: float, now_s: float) -> float:
        """0 the first time."""
        last, self._last = self._last, (work_s, now_s)
        if last is None or now_s <= last[1]:
            return 0.0
        return (work_s - last[0]) / (now_s - last[1])
