"""What the garbage collector is to leave alone: all that was there before the first request."""

from __future__ import annotations

import gc

# New objects before the young ones are looked through. A step makes some hundreds, none of them in cycles.
_YOUNG, _MIDDLE, _OLD = 20_000, 20, 20


def freeze() -> None:
    """To be called once everything is loaded. A collection of all that torch, Ray and FastAPI bring along would stop
    every stream for a tenth of a second, now and then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
