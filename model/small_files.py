"""Reading files that may come from elsewhere and are meant to be small: nothing that never ends, nothing too large."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_small_text(path: str | os.PathLike[str], max_bytes: int) -> str:
    """The text of a regular file of at most `max_bytes`. Raises OSError where it cannot be read, else ValueError."""
    path = Path(path)
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # Opening a directory says best what is wrong with it.
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"too large: more than {max_bytes} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
