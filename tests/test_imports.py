"""Who may import whom, read from the source; and what must stay out of a process until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "service", "loadtests")

# module or package: what neither it nor anything it imports at import time may import.
NEVER = {
    "model": {"service", "ray", "fastapi"},
    "model.config": {"torch", "ray"},
    "model.tokenizer": {"torch", "ray"},
    "model.detokenizer": {"torch", "ray"},
    "service.gateway": {"torch", "ray"},
    "service.metrics": {"torch", "ray"},
    "service.settings": {"torch", "ray"},
    "service.cli": {"torch", "ray", "fastapi", "uvicorn"},
    "service.engine": {"ray", "fastapi", "service.gateway"},
    "loadtests": {"model", "service", "torch", "ray"},
}
STDLIB_ONLY = (
    *("request", "stats", "distribution", "meter", "record", "inspection", "errors"),
    *(
        "block_holders",
        "block_manager",
        "continuations",
        "prefix_keys",
        "prefix_cache",
        "swap_pool",
        "short_term",
        "step",
        "scheduler",
        "sequence",
        "token_counts",
        "waiting_queue",
    ),
    *("admission", "drain_rate", "capacity", "backlog"),
)
# The composition root of Ray, and what it owns.
MAY_IMPORT_RAY = ("service.deployment", "service.ray")


def _modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(name: str, *, at_import_time: bool) -> set[str]:
    """What a module imports, ours as modules, others as they are named. TYPE_CHECKING blocks do not count."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = set()
    for node in _nodes(tree, enters_functions=not at_import_time):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            assert node.module is not None
            # `from package import module` imports the module, `from module import name` that module.
            found |= {full if (full := f"{node.module}.{a.name}") in MODULES else node.module for a in node.names}
    return found


def _nodes(tree: ast.AST, *, enters_functions: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not enters_functions:
            continue
        yield node
        yield from _nodes(node, enters_functions=enters_functions)


def _with_parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def _reach(name: str) -> dict[str, list[str]]:
    """Everything imported when `name` is, with the chain that leads there."""
    chains: dict[str, list[str]] = {name: [name]}
    queue = [name]
    while queue:
        current = queue.pop()
        for imported in _imports(current, at_import_time=True):
            for part in _with_parents(imported):
                if part not in chains:
                    chains[part] = [*chains[current], part]
                    if part in MODULES:
                        queue.append(part)
    return chains


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("package", NEVER)
def test_what_a_part_never_imports(package: str) -> None:
    modules = [name for name in MODULES if _inside(name, package)]
    assert modules, f"nothing named {package}"
    for name in modules:
        chains = _reach(name)
        direct = _imports(name, at_import_time=False)
        for forbidden in NEVER[package]:
            assert forbidden not in chains, " -> ".join(chains[forbidden])
            is_allowed_inside = package == "service.cli"  # its commands import when they run
            assert is_allowed_inside or not any(_inside(n, forbidden) for n in direct), f"{name} imports {forbidden}"


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_the_engines_policy_needs_the_standard_library_alone(name: str) -> None:
    for reached in _reach(f"service.engine.{name}"):
        assert reached in MODULES or reached.split(".")[0] in sys.stdlib_module_names


def test_only_the_deployment_knows_ray() -> None:
    for name in MODULES:
        if not name.startswith(MAY_IMPORT_RAY):
            assert not any(_inside(n, "ray") for n in _imports(name, at_import_time=False)), name


def test_no_import_cycles() -> None:
    graph = {name: {n for n in _imports(name, at_import_time=True) if n in MODULES} - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_help_needs_neither_torch_nor_ray_nor_the_gateway() -> None:
    code = "import sys, service.cli; print([m for m in ('torch', 'ray', 'fastapi', 'uvicorn') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
