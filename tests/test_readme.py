"""Every code block of README.md runs as it is written, in a copy of the repository, against a real server.

Only the port differs: where a block says 127.0.0.1:8000, the server started by the README's own `make serve` listens on
a free one. `make serve` runs without Ray and `make test` runs one small file, by way of the environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from model.tokenizer import Tokenizer
from service.settings import DEFAULT_MODEL
from tests.model.published_checkpoints import library_checkpoint
from tests.service.process import ServerProcess, clean_environment

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
SERVE = {"TESSERA_LOCAL": "1", "TESSERA_THREADS": "1"}
TEST = {"ARGS": "tests/test_imports.py -p no:cacheprovider", "JOBS": "0"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository by way of links, with a .venv that is this very environment, and a checkpoint to convert."""
    copy = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git"):
            (copy / path.name).symlink_to(path)
    (copy / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith("installed"):
            (copy / ".venv" / path.name).symlink_to(path)
    for stamp in ("installed", "installed-dev"):
        (copy / ".venv" / stamp).touch()
    shutil.copy(DEFAULT_MODEL / "tokenizer.json", copy)
    tokenizer = Tokenizer.load(DEFAULT_MODEL)
    assert tokenizer is not None
    torch.save(library_checkpoint(vocab_size=tokenizer.vocab_size), copy / "ckpt.pt")
    return copy


@pytest.fixture(scope="module")
def server(workspace: Path) -> Iterator[ServerProcess]:
    """What the README starts first."""
    language, text = BLOCKS[0]
    assert (language, text) == ("bash", "make serve\n")
    with _serve(text, workspace) as server:
        yield server
        server.stop()  # make itself reports the signal; what it ran must have ended well
        assert server.output.endswith("Ended.\n") or "Ended.\nmake: " in server.output


def _serve(text: str, workspace: Path) -> ServerProcess:
    return ServerProcess(command=("bash", "-c", f"exec {text}"), cwd=workspace, environment=SERVE)


def _run(language: str, text: str, workspace: Path) -> str:
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    environment = clean_environment(TEST)
    done = subprocess.run(
        command,
        cwd=workspace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _name(block: tuple[str, str]) -> str:
    return next(line for line in block[1].splitlines() if line and not line.startswith("from"))[:40]


@pytest.mark.parametrize("block", BLOCKS, ids=_name)
def test_a_block_runs(block: tuple[str, str], workspace: Path, request: pytest.FixtureRequest) -> None:
    language, text = block
    assert language in ("bash", "python"), f"a block in {language} is run by nobody"
    if text == "make serve\n":
        server: ServerProcess = request.getfixturevalue("server")
        assert httpx.get(server.url + "/readyz").status_code == 200
    elif " serve " in text:
        with _serve(text, workspace) as server:
            answer = httpx.post(server.url + "/v1/completions", json={"prompt": [1, 2], "max_tokens": 2}, timeout=60)
            assert answer.json()["model"] == "my-model"
    else:
        if text.startswith("curl") and shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        if "127.0.0.1:8000" in text:
            server = request.getfixturevalue("server")
            text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        assert _run(language, text, workspace).strip() or "model.convert" in text


def test_the_first_commands_are_the_two_that_matter() -> None:
    assert [text for _, text in BLOCKS[:2]] == ["make serve\n", "make test\n"]


def test_make_installs_before_it_serves_or_tests(workspace: Path) -> None:
    for target in ("serve", "test", "lint"):
        plan = subprocess.run(
            ["make", "--dry-run", target, f"VENV={workspace}/fresh"],
            cwd=workspace,
            env=clean_environment({"PATH": os.environ["PATH"]}),
            capture_output=True,
            text=True,
            check=True,
        )
        assert plan.stdout.index(".ci/install") < plan.stdout.rindex(f"{workspace}/fresh/bin/")
