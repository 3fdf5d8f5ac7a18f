"""What holds for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes tells of the machine's other work.
settings.register_profile("tessera", deadline=None)
settings.load_profile("tessera")

# Files whose tests start a Ray, besides those that are called after it.
_WITH_RAY = {"test_chaos.py", "test_readme.py", "test_serve_cluster.py", "test_serve_ray.py", "test_tracing.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, each takes whole files, so that what a file starts is started once.

    All files that start a Ray go to the same: two at a time get into each other's way. They come first, then the long
    tests of this directory: else one process would work at them alone at the end.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if _starts_ray(item.path) else str(item.path)))
    here = Path(__file__).parent
    items.sort(key=lambda item: (not _starts_ray(item.path), item.path.parent != here))


def _starts_ray(path: Path) -> bool:
    return path.name in _WITH_RAY or path.name.startswith("test_ray_")
