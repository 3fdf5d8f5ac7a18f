"""Being interrupted while something slow is loaded."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager

from service.errors import ExitCode

_SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def interruptible() -> Generator[None, None, None]:
    """SIGINT ends the process at once while entered, with nothing to clean up.

    Python's own way, an exception in the middle of whatever runs, gets lost where a library catches everything.
    """
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(*_: object) -> None:
    # A spinner has hidden it.
    os.write(sys.stderr.fileno(), (_SHOW_CURSOR if sys.stderr.isatty() else "").encode() + b"\n")
    os._exit(ExitCode.INTERRUPTED)
