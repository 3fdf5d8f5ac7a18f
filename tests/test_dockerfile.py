"""Runs the Dockerfile's steps without Docker: those of the unprivileged user, in a bare directory, for real.

Checked: what is copied, the pip installations, the start command, the health check, the stop signal. Not checked: the
base image and the steps that run as root (apt-get and useradd), which change the machine they run on.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.server import free_port
from tests.dockerfile import Stage, parse

ROOT = Path(__file__).resolve().parent.parent
BUILD, FINAL = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
HOME = "/home/tessera"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A bare directory in place of the user's home, and whose commands run in it."""

    home: Path
    identity: Mapping[str, Any]
    path: str

    def environment(self, stage: Stage, extra: Mapping[str, str]) -> dict[str, str]:
        """What a command of `stage` sees: its ENV, and of this machine only how pip finds packages."""
        machine = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        machine |= {"HOME": HOME, "PATH": self.path, "LANG": "C.UTF-8"}
        values = stage.environment(machine) | dict(extra)
        return {name: value.replace(HOME, str(self.home)) for name, value in values.items()}

    def run(self, command: list[str], stage: Stage, extra: Mapping[str, str], timeout_s: float) -> int:
        environment = self.environment(stage, extra)
        executable = shutil.which(command[0], path=environment["PATH"])
        done = subprocess.run(
            command, executable=executable, cwd=self.home, env=environment, timeout=timeout_s, **self.identity
        )
        return done.returncode


def _identity() -> dict[str, Any]:
    """Arguments of `subprocess` for a user without privileges: `nobody` where we are root, else ourselves."""
    if os.getuid() != 0:
        return {}
    return {"user": "nobody", "group": "nogroup", "extra_groups": []}


def _python(identity: Mapping[str, Any]) -> str:
    """An interpreter that this user can run and that can make environments."""
    check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    for candidate in (sys._base_executable, "/usr/bin/python3", "/usr/local/bin/python3"):  # type: ignore[attr-defined]
        try:
            done = subprocess.run([candidate, "-c", check], cwd="/", env={}, stderr=subprocess.DEVNULL, **identity)
        except OSError:
            continue
        if done.returncode == 0:
            return str(candidate)
    missing = "no Python 3.11 or newer, with venv, that an unprivileged user can run: install python3-venv"
    if os.environ.get("TESSERA_REQUIRE_SYSTEM_PYTHON"):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    identity = _identity()
    python = _python(identity)
    home = Path(tempfile.mkdtemp(prefix="tessera-", dir="/tmp"))
    try:
        (home / "bin").mkdir()
        (home / "bin" / "python3").symlink_to(python)
        if identity:
            for path in (home, home / "bin"):
                shutil.chown(path, identity["user"], identity["group"])
        yield Sandbox(home, identity, f"{home}/bin:/usr/local/bin:/usr/bin:/bin")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _is_sent(path: str) -> bool:
    """Whether .dockerignore lets the builder see `path`; its last matching line decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and (pattern == "*" or fnmatch.fnmatch(path, pattern)):
            sent = line.startswith("!")
    return sent


def test_the_image_gets_what_it_needs_and_no_more() -> None:
    sources = [word for item in BUILD.all("COPY") for word in item.words[:-1]]
    assert all((ROOT / source).exists() and _is_sent(source) for source in sources)
    assert not any(_is_sent(name) for name in (".git", ".venv", "tests", "runs", "__pycache__"))


def test_it_ends_unprivileged_behind_a_process_that_reaps() -> None:
    assert FINAL.last("USER").text == BUILD.last("USER").text == "10001:10001"
    assert FINAL.last("ENTRYPOINT").exec_form == ["tini", "--"]
    assert FINAL.last("EXPOSE").text == FINAL.environment({})["TESSERA_PORT"] == "8000"
    assert FINAL.environment({})["TESSERA_HOST"] == "0.0.0.0"
    assert {stage.base for stage in (BUILD, FINAL)} == {"python:3.11-slim-bookworm"}


def test_a_build_argument_makes_the_variant_for_gpus() -> None:
    """The argument decides where torch comes from, and nothing else does: the final stage takes what was installed."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    [index] = set(re.findall(r"--build-arg TORCH_INDEX=(\S+)", text))
    assert index.removesuffix("/cu130") == BUILD.last("ARG").text.split("=")[1].removesuffix("/cpu")
    [torch, rest] = [item.text for item in BUILD.all("RUN") if "pip install" in item.text]
    assert '--extra-index-url "$TORCH_INDEX" "$torch"' in torch
    assert "index" not in rest
    assert not FINAL.all("ARG")
    assert FINAL.environment({})["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_steps_as_root_only_install_packages_and_make_the_user() -> None:
    for stage in (BUILD, FINAL):
        steps = stage.instructions[: [item.name for item in stage.instructions].index("USER")]
        for item in steps:
            if item.name == "RUN":
                assert {part.split()[0] for part in item.text.split("&&")} <= {"apt-get", "useradd", "rm", "ln"}


def test_install_and_start(sandbox: Sandbox) -> None:
    _build(sandbox)
    shutil.rmtree(sandbox.home / "model")
    shutil.rmtree(sandbox.home / "service")
    _serve(sandbox)


def _build(sandbox: Sandbox) -> None:
    """The first stage, from its USER on."""
    steps = BUILD.instructions[[item.name for item in BUILD.instructions].index("USER") + 1 :]
    arguments = _reachable({item.text.split("=")[0]: item.text.split("=")[1] for item in BUILD.all("ARG")})
    # Spares compiling ten thousand modules, most of which nobody imports. 0 stands for no --compile here, not for yes.
    arguments["PIP_NO_COMPILE"] = "0"
    for item in steps:
        if item.name == "COPY":
            _copy(sandbox, item.words)
        elif item.name == "RUN":
            command = ["sh", "-c", item.text]
            assert sandbox.run(command, BUILD, arguments, timeout_s=600) == 0, item.text
        else:
            assert item.name in ("WORKDIR", "ARG"), f"{item.name} is not understood here"


def _reachable(arguments: dict[str, str]) -> dict[str, str]:
    """Build arguments; PyPI in place of an index that this machine cannot reach."""
    try:
        urllib.request.urlopen(arguments["TORCH_INDEX"] + "/torch/", timeout=5).close()
    except OSError:
        arguments["TORCH_INDEX"] = "https://pypi.org/simple"
    return arguments


def _copy(sandbox: Sandbox, words: list[str]) -> None:
    *sources, target = words
    for source in sources:
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
            shutil.copytree(ROOT / source, sandbox.home / target, ignore=ignore)
        else:
            shutil.copy(ROOT / source, sandbox.home / target)
    if sandbox.identity:
        for path in sandbox.home.rglob("*"):
            if not path.is_symlink():
                shutil.chown(path, sandbox.identity["user"], sandbox.identity["group"])


def _serve(sandbox: Sandbox) -> None:
    """The second stage's start command, health check and stop signal."""
    extra = {"TESSERA_PORT": str(port := free_port()), "TESSERA_HOST": "127.0.0.1"}
    entry = FINAL.last("ENTRYPOINT").exec_form if shutil.which("tini") else []
    command = [*entry, *FINAL.last("CMD").exec_form]
    environment = sandbox.environment(FINAL, extra)
    executable = shutil.which(command[0], path=environment["PATH"])
    server = subprocess.Popen(
        command, executable=executable, cwd=sandbox.home, env=environment, start_new_session=True, **sandbox.identity
    )
    try:
        _wait_until_healthy(sandbox, server, extra)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "Once", "max_tokens": 4}, timeout=60
        )
        assert answer.status_code == 200
        assert "<html" in httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text
        server.send_signal(signal.Signals[FINAL.last("STOPSIGNAL").text])
        assert server.wait(timeout=30) == 0
        deadline = time.monotonic() + 10
        while _processes_with(f"TESSERA_PORT={port}"):
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.2)
    finally:
        for pid in _processes_with(f"TESSERA_PORT={port}"):
            os.kill(pid, signal.SIGKILL)
        server.wait()


def _processes_with(variable: str) -> list[int]:
    """Processes that were started with this in their environment: the server, and all that came from it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _wait_until_healthy(sandbox: Sandbox, server: subprocess.Popen[bytes], extra: Mapping[str, str]) -> None:
    check = json.loads(FINAL.last("HEALTHCHECK").text.split(" CMD ", 1)[1])
    deadline = time.monotonic() + 120
    while sandbox.run(check, FINAL, extra, timeout_s=30):
        assert server.poll() is None, f"ended with {server.returncode}"
        assert time.monotonic() < deadline, "not healthy after 120 s"
        time.sleep(1)
