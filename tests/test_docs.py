"""What docs/operating.md says of options and exit codes is what the program does.

`TESSERA_UPDATE_DOCS=1 pytest tests/test_docs.py` writes the table of options anew.
"""

from __future__ import annotations

import importlib
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from model import layers as model_layers
from model import mosaic_v2
from service.errors import ExitCode
from service.settings import ServeSettings, env_name, flag
from tests.documented import hold_table

ROOT = Path(__file__).resolve().parent.parent
OPERATING = ROOT / "docs" / "operating.md"


def options_table() -> str:
    rows = ["", "| option | environment | default | |", "| --- | --- | --- | --- |"]
    for name, field in ServeSettings.model_fields.items():
        description = f"{field.description} {_choices(field.annotation)}".strip()
        rows.append(f"| `{flag(name)}` | `{env_name(name)}` | {_default(field.default)} | {description} |")
    return "\n".join([*rows, "", ""])


def _default(value: object) -> str:
    if value in (None, (), ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value.name if isinstance(value, Path) else value}`"


def _choices(annotation: Any) -> str:
    if typing.get_origin(annotation) is not typing.Literal:
        return ""
    return "One of " + ", ".join(f"`{choice}`" for choice in typing.get_args(annotation)) + "."


def test_the_table_of_options_is_complete() -> None:
    hold_table(OPERATING, "options", options_table(), "tests/test_docs.py")


def test_exit_codes_are_those_of_the_program() -> None:
    section = OPERATING.read_text(encoding="utf-8").split("## Exit codes")[1].split("##")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)] == [int(c) for c in ExitCode]


def test_the_code_that_the_models_equations_name_exists() -> None:
    named = set(
        re.findall(r"`([a-z][a-z0-9_.]*\.[A-Za-z]\w*)`", (ROOT / "docs" / "model.md").read_text(encoding="utf-8"))
    )
    found = {name for name in named if (ROOT / "model" / f"{name.rpartition('.')[0].replace('.', '/')}.py").exists()}
    for name in found:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(f"model.{module}"), member), f"docs/model.md names {name}"
    layers = {
        f"{m.__name__.removeprefix('model.')}.{name}"
        for m in (model_layers, mosaic_v2)
        for name, member in vars(m).items()
        if isinstance(member, type) and member.__module__ == m.__name__ and not name.startswith("_")
    }
    assert layers - found == {"layers.LayerNorm", "layers.Linear"}, "parts of the networks that the page leaves out"


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_what_security_rests_on_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|deploy|docs)/[\w./-]+|constraints\.txt)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []
    options = re.findall(r"`(--[a-z-]+)`", text)
    assert {flag(name) for name in ServeSettings.model_fields} >= set(options)
