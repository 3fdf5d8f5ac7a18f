"""When an open-loop load sends its requests. Knows times only."""

from __future__ import annotations

import random
from collections.abc import Iterator


def poisson_arrivals(rate: float, seed: int | str) -> Iterator[float]:
    """Seconds from the start, ascending without end: independent arrivals, `rate` a second on average.

    The same seed gives the same times, so that two servers face the same rush.
    """
    draws = random.Random(f"{seed}:arrivals")
    at = 0.0
    while True:
        at += draws.expovariate(rate)
        yield at
