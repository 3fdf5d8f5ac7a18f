"""The files of a model directory as they were when it was offered, to be read piece by piece."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

PIECE_BYTES = 4 << 20


class ModelOffer:
    """Holds the files open: what replaces them under their names later is not what was offered."""

    def __init__(self, directory: Path | None, names: Iterable[str]) -> None:
        """Offers those of `names` that are regular files there and can be read; without a directory none."""
        self._files: dict[str, int] = {}
        for path in [directory / name for name in names] if directory else []:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    self._files[path.name] = descriptor
                else:
                    os.close(descriptor)

    def sizes(self) -> Mapping[str, int]:
        """The bytes of each file."""
        return {name: os.fstat(descriptor).st_size for name, descriptor in self._files.items()}

    def piece(self, name: str, offset: int) -> bytes:
        """At most `PIECE_BYTES` of a file, from there on. Raises KeyError for what is not offered."""
        return os.pread(self._files[name], PIECE_BYTES, offset)
