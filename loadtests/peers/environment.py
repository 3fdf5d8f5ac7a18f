"""Where peers are installed: virtual environments and programs under one directory, outside this project's own.

Everything comes from the package registries that pip is configured for, and from what the system has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.errors import LoadTestError

STEP_TIMEOUT_S = 3600.0
_DONE = "installed"


class InstallError(LoadTestError):
    """A peer could not be installed here. The message is the last line of what failed; the log has all of it."""

    exit_code = 4


class Environment:
    """A directory with a virtual environment, a log of what was done to it, and a mark once that is complete."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.log = self.directory / "install.log"

    @property
    def bin(self) -> Path:
        return self.directory / "venv" / "bin"

    @property
    def site_packages(self) -> Path:
        """Raises InstallError where there is no environment yet."""
        found = sorted((self.directory / "venv" / "lib").glob("python3*/site-packages"))
        if not found:
            raise InstallError(f"{self.directory}: no virtual environment")
        return found[0]

    def is_complete(self, version: str) -> bool:
        mark = self.directory / _DONE
        return mark.exists() and mark.read_text().strip() == version

    def complete(self, version: str) -> None:
        (self.directory / _DONE).write_text(f"{version}\n")

    def create(self) -> None:
        """Makes the virtual environment unless it is there. Raises InstallError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.bin / "pip").exists():
            self.run([sys.executable, "-m", "venv", str(self.directory / "venv")])

    def pip(self, *arguments: str) -> None:
        """Raises InstallError."""
        self.run([str(self.bin / "pip"), "--disable-pip-version-check", *arguments])

    def run(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Runs one step at the lowest priority, its output in the log. Raises InstallError."""
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            try:
                done = subprocess.run(
                    ["nice", "-n", "19", *command],
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **(env or {})},
                    timeout=STEP_TIMEOUT_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise InstallError(f"{command[0]}: {error} (see {self.log})") from error
        if done.returncode:
            raise InstallError(
                f"{Path(command[0]).name} ended with {done.returncode}: {self._last_line()} ({self.log})"
            )

    def _last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or [""])[-1].strip()[:200]
