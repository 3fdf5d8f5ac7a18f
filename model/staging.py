"""Writing a model directory whole: its files appear together, the configuration last, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.fingerprint import CONFIG_FILE


def check_free(out_dir: Path, *, allow_files: bool = False) -> None:
    """Raises ValueError where `out_dir` is neither new nor an empty directory; with `allow_files` it may hold files."""
    if out_dir.is_dir():
        if not allow_files and any(out_dir.iterdir()):
            raise ValueError(f"{out_dir}: not empty; give a new or empty directory")
    elif out_dir.exists() or out_dir.is_symlink():
        raise ValueError(f"{out_dir}: not a directory")


@contextmanager
def complete_or_absent(out_dir: Path) -> Iterator[Path]:
    """A directory to write into: its files become those of `out_dir` at the end, or vanish on an error.

    Files of the same names in `out_dir` are replaced, others stay.
    """
    # A directory that is there may be a mount point, which cannot be renamed over: its files move one by one.
    exists = out_dir.is_dir()
    stage = (out_dir if exists else out_dir.parent) / f".{out_dir.name}.{os.getpid()}.partial"
    moved: list[Path] = []
    try:
        stage.mkdir(parents=True)
        yield stage
        if exists:
            # The configuration last: a directory without it is no model.
            for file in sorted(stage.iterdir(), key=lambda file: file.name == CONFIG_FILE):
                moved.append(file.rename(out_dir / file.name))
            stage.rmdir()
        else:
            stage.rename(out_dir)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for file in moved:
            file.unlink(missing_ok=True)
        raise
