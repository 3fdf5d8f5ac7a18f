"""How fast an engine gets rid of what it has accepted, measured while it had something to do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW = 64
_UNKNOWN_S = 1.0


class DrainRate:
    """Over the last requests that ended. Time in which nothing was there to end does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._idle_since_s: float | None = clock()
        self._idle_time_s = 0.0
        self._ends: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=_WINDOW + 1)

    def busy(self) -> None:
        """There is something to do, from now on."""
        if self._idle_since_s is not None:
            self._idle_time_s += self._clock() - self._idle_since_s
            self._idle_since_s = None

    def ended(self, num_tokens: int) -> None:
        """A request that could come to `num_tokens` tokens has ended."""
        self._ends.append((self._busy_time_s(), num_tokens))

    def idle(self) -> None:
        """There is nothing to do, from now on."""
        if self._idle_since_s is None:
            self._idle_since_s = self._clock()

    def seconds_until(self, num_requests: int, num_tokens: int) -> float:
        """Until so many requests, and requests of so many tokens, will have ended."""
        if len(self._ends) == 1:
            return _UNKNOWN_S
        (since_s, _), *ends = self._ends
        span_s = self._busy_time_s() - since_s
        tokens = sum(tokens for _, tokens in ends)
        return max(span_s * num_requests / len(ends), span_s * num_tokens / max(tokens, 1))

    def _busy_time_s(self) -> float:
        now_s = self._clock() if self._idle_since_s is None else self._idle_since_s
        return now_s - self._idle_time_s
