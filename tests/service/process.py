"""A real `tessera serve` in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

_URL = re.compile(r"is ready after [\d.]+ s at (https?://[^\s\\]+|unix:[^\s\\]+)")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without options of ours, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TESSERA_")}
    return kept | {"COLUMNS": "200"} | dict(extra or {})


class ServerProcess:
    """Context manager: starts `command`, waits until it says where it serves, and ends it with SIGTERM.

    `output` is what it has written so far, stderr and stdout together; `start_up_cpu_s` is the CPU time until ready.
    """

    def __init__(
        self,
        *options: str,
        command: Sequence[str] = (sys.executable, "-m", "service", "serve"),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self._command = [*command, *options]
        self._cwd = cwd
        self._environment = clean_environment({"TESSERA_PORT": "0"} | dict(environment or {}))
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.url = ""
        self.start_up_cpu_s = 0.0

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, cwd=self._cwd, env=self._environment
        )
        try:
            self._wait_for_url()
        except BaseException:
            self.process.kill()
            self.process.wait()
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()
        self._log.close()

    @property
    def output(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 120.0) -> int:
        """The exit code; kills the process where it does not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output}") from None

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.signal()
        return self.wait()

    def _cpu_seconds(self) -> float:
        """CPU time the process has used, its ended children left out."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _wait_for_url(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not (found := _URL.search(self.output)):
            code = self.process.poll()
            assert code is None, f"ended with {code}:\n{self.output}"
            assert time.monotonic() < deadline, f"not ready after {self._timeout_s} s:\n{self.output}"
            time.sleep(0.02)
        self.url = found[1]
        self.start_up_cpu_s = self._cpu_seconds()
