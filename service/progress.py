"""What a person sees while something slow starts: a spinner on a terminal, plain lines elsewhere. On stderr.

Where the log is JSON, so is this.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from service.logs import is_json

logger = logging.getLogger("tessera")


class Progress:
    """Reports steps as they begin and end. Says nothing at all when quiet."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._started_s

    @contextmanager
    def step(self, title: str) -> Generator[None, None, None]:
        """Shows `title` while the body runs, then how long it took. A failing step leaves no line of its own."""
        if self._is_quiet:
            yield
            return
        started_s = time.monotonic()
        if sys.stderr.isatty() and not is_json():
            with _spinner(title):
                yield
        else:
            _write(f"{title} ...")
            yield
        _write(f"{title}: {time.monotonic() - started_s:.1f} s")

    def say(self, text: str) -> None:
        """Plain lines, as they are."""
        if not self._is_quiet:
            _write(text)


def _write(text: str) -> None:
    if is_json():
        logger.info("%s", text.strip())
    else:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _spinner(title: str) -> Generator[None, None, None]:
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield
