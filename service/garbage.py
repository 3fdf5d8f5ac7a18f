"""What the garbage collector is to leave alone: all that was there before the first request."""

from __future__ import annotations

import gc


def freeze() -> None:
    """To be called once everything is loaded. A collection of all that torch, Ray and FastAPI bring along would stop
    every stream for a tenth of a second, now and then.
    """
    gc.collect()
    gc.freeze()
