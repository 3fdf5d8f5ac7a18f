"""What a person sees while something slow starts: a spinner on a terminal, plain lines elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager


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
        if sys.stderr.isatty():
            with _spinner(title):
                yield
        else:
            print(f"{title} ...", file=sys.stderr, flush=True)
            yield
        print(f"{title}: {time.monotonic() - started_s:.1f} s", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Plain lines, as they are."""
        if not self._is_quiet:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _spinner(title: str) -> Generator[None, None, None]:
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield
