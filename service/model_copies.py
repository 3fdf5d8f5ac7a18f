"""Copies of model directories that this machine was sent: for one user alone, whole and right, or not there at all.

Knows neither who sends them nor what they are for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from model.fingerprint import CONFIG_FILE, WEIGHTS_FILE, Identity, identify
from model.tokenizer import TOKENIZER_FILE
from service.errors import EngineStartError, ModelNotFoundError

MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)
"""All that an engine reads of a model directory; nothing else travels."""
_PARTIAL = "partial-"
_LOCK = "lock"


class Source(Protocol):
    """Where a copy comes from. All methods raise CommandError where it cannot be had."""

    def sizes(self) -> Mapping[str, int]:
        """The bytes of each of its files."""

    def pieces(self, name: str) -> Iterable[bytes]:
        """The content of one of them."""


class ModelCopies:
    """The copies in one directory, of at most `max_bytes` together. Processes share it; all methods block.

    A copy is checked against what it should be before every use. What a process was lent stays until that process
    ends; else those used least recently go where there is no room.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Makes the directory where it is not there. Raises OSError, also where others could write into it."""
        self._directory = _make_private(directory)
        self._max_bytes = max_bytes
        self._held: list[int] = []

    def lend(self, identity: Identity, source: Source) -> Path:
        """A directory of that content, from `source` where there is none yet. One process fetches, others wait for it.

        Raises CommandError where the source has something else or too much of it, OSError where it cannot be written.
        """
        copy = self._directory / _name(identity)
        with self._locked():
            if not holds(copy, identity):
                shutil.rmtree(copy, ignore_errors=True)
                self._fetch(copy, identity, source)
            os.utime(copy)
            self._hold(copy)
        return copy

    def _hold(self, copy: Path) -> None:
        """Locks it for as long as this process lives."""
        descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self._held.append(descriptor)

    def _fetch(self, copy: Path, identity: Identity, source: Source) -> None:
        for left in self._directory.glob(f"{_PARTIAL}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        sizes = _checked(source.sizes())
        self._make_room(sum(sizes.values()))
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._directory))
        try:
            for name, num_bytes in sizes.items():
                _write(partial / name, source.pieces(name), num_bytes)
            if not holds(partial, identity):
                raise ModelNotFoundError(f"the checkpoint that was sent is not {identity}, which was asked for")
            partial.rename(copy)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, num_bytes: int) -> None:
        copies = [path for path in self._directory.iterdir() if path.is_dir()]
        excess = num_bytes - self._max_bytes + sum(map(_size, copies))
        if num_bytes <= self._max_bytes:
            for copy in sorted(copies, key=lambda copy: copy.stat().st_mtime):
                if excess > 0 and not _is_in_use(copy):
                    excess -= _size(copy)
                    shutil.rmtree(copy)
        if excess > 0:
            raise EngineStartError(
                f"the checkpoint takes {num_bytes} bytes; copies of {self._max_bytes} are kept on a machine, and those "
                "in use stay: see --model-copies"
            )

    @contextmanager
    def _locked(self) -> Generator[None, None, None]:
        lock = os.open(self._directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def copies_directory() -> Path:
    """Where this user's copies are on this machine: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "tessera" / "models"


def holds(directory: Path, identity: Identity) -> bool:
    """Whether that is what the directory holds. Reads all of it."""
    try:
        return identify(directory) == identity
    except (OSError, ValueError):
        return False


def _name(identity: Identity) -> str:
    return hashlib.sha256(f"{identity.fingerprint} {identity.tokenizer}".encode()).hexdigest()


def _checked(sizes: Mapping[str, int]) -> Mapping[str, int]:
    """`sizes`, where they are those of a model's files: whoever sends them does not choose where they are written."""
    if strange := sorted(sizes.keys() - set(MODEL_FILES)):
        raise ModelNotFoundError(f"{strange[0]!r} was sent, which is no file of a model")
    if any(num_bytes < 0 for num_bytes in sizes.values()):
        raise ModelNotFoundError("a file of less than nothing was sent")
    return sizes


def _write(path: Path, pieces: Iterable[bytes], num_bytes: int) -> None:
    num_written = 0
    with path.open("xb") as file:
        for piece in pieces:
            num_written += len(piece)
            if num_written > num_bytes:
                break
            file.write(piece)
    if num_written != num_bytes:
        raise ModelNotFoundError(f"{path.name} was not sent as announced: {num_bytes} bytes")


def _make_private(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{directory} has to be a directory that its owner alone may use, and this user's")
    return directory


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def _is_in_use(copy: Path) -> bool:
    descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
