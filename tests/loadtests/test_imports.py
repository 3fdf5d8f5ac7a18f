"""Peers are measured with the same eyes: the load client imports nothing of ours but itself."""

import ast
import sys
from pathlib import Path

import loadtests

ALLOWED = {"loadtests", "matplotlib", "uvloop"}
STANDS_ALONE = {"transformer.py": {"numpy", "gguf"}}
"""Runs with the interpreter of the peers' tools."""


def test_only_itself_and_what_its_extra_names_is_imported() -> None:
    for path in Path(loadtests.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module or ""]
            foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ALLOWED
            foreign -= STANDS_ALONE.get(path.name, set())
            assert not foreign, f"{path.name} imports {foreign}"
