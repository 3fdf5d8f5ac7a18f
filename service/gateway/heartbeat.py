"""Noticing that a stream has said nothing for a while, so that a sign of life can be sent in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self


class Heartbeat:
    """While entered, `is_due` turns true and `wake` is called whenever `sent` was not for most of `period_s`.

    The silence is at least half of `period_s` long and at most the whole. Without a period nothing is ever due.
    """

    def __init__(self, period_s: float | None, wake: Callable[[], None]) -> None:
        self._period_s = period_s
        self._wake = wake
        self._timer: asyncio.TimerHandle | None = None
        self._has_sent = True
        self.is_due = False

    def __enter__(self) -> Self:
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def sent(self) -> None:
        """Something went out just now."""
        self._has_sent = True
        self.is_due = False

    def _arm(self) -> None:
        if self._period_s is not None:
            # One timer for a whole stream: nothing is done for each of its tokens but to set a flag.
            self._timer = asyncio.get_running_loop().call_later(self._period_s / 2, self._tick)

    def _tick(self) -> None:
        if not self._has_sent:
            self.is_due = True
            self._wake()
        self._has_sent = False
        self._arm()
