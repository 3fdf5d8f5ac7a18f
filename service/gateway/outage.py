"""Something that is asked again and again, and the one line in the log when it falls silent."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)


class Outage:
    """Tells the log when `name` does not answer any more, and when it does again."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since_s: float | None = None

    def goes_on(self, error: Exception) -> None:
        """It has failed, for the first time or once more."""
        if self._since_s is None:
            self._since_s = time.monotonic()
            logger.warning("asking %s fails from now on: %r", self._name, error)

    def is_over(self) -> None:
        """It has answered."""
        if self._since_s is not None:
            logger.warning("asking %s works again, after %.0f s", self._name, time.monotonic() - self._since_s)
            self._since_s = None
