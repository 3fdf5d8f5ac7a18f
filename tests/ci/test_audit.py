"""The audit of what is installed, on environments made up: without a network, it misses nothing it claims to see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def install(site: Path, name: str, version: str, *headers: str, is_from_index: bool = True) -> None:
    """What pip leaves of a distribution, as far as the audit reads it."""
    directory = site / f"{name}-{version}.dist-info"
    directory.mkdir(parents=True)
    text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *headers, "", ""])
    (directory / "METADATA").write_text(text)
    if not is_from_index:
        (directory / "direct_url.json").write_text('{"url": "https://example.com/x.whl"}')


def audit(tmp_path: Path) -> tuple[int, list[str]]:
    """Its exit code and lines, for the distributions below `tmp_path`."""
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["heavy==2.0", "loose>=1"]\n')
    (tmp_path / "constraints.txt").write_text("# Versions.\nloose==1.5\nOdd_Name==3.0\n")
    command = [
        sys.executable,
        str(ROOT / ".ci" / "audit.py"),
        "--root",
        str(tmp_path),
        "--site",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def test_what_is_pinned_passes(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "loose", "1.5", "License-Expression: (MIT OR Apache-2.0) AND BSD-3-Clause")
    install(site, "odd.name", "3.0", "Classifier: License :: OSI Approved :: MIT License")
    install(site, "heavy", "2.0+cpu", "License: BSD", "Requires-Dist: driver==7.1; platform_system == 'Linux'")
    install(site, "driver", "7.1", "License: MIT License")
    install(site, "pip", "99.0")
    assert audit(tmp_path) == (0, ["4 distributions are pinned, under licences accepted here"])


@pytest.mark.parametrize(
    ("name", "version", "headers", "is_from_index", "fault"),
    [
        ("loose", "1.6", ["License: MIT"], True, "is 1.6, pinned is 1.5"),
        ("heavy", "2.1", ["License: MIT"], True, "is 2.1, pinned is 2.0"),
        ("stray", "1.0", ["License: MIT"], True, "is not pinned in constraints.txt"),
        ("loose", "1.5", [], True, "does not say what licence it is under"),
        ("loose", "1.5", ["License-Expression: MIT AND AGPL-3.0-only"], True, "not accepted here: agpl-3.0-only"),
        ("loose", "1.5", ["License: MIT"], False, "was not installed from an index"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, name: str, version: str, headers: list[str], is_from_index: bool, fault: str
) -> None:
    install(tmp_path / "site", name, version, *headers, is_from_index=is_from_index)
    code, [line] = audit(tmp_path)
    assert code == 1
    assert line.startswith(f"{name} ")
    assert line.endswith(fault)


def test_nothing_installed_is_no_clean_bill(tmp_path: Path) -> None:
    assert audit(tmp_path)[0] == 1
