"""What holds for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes tells of the machine's other work.
settings.register_profile("tessera", deadline=None)
settings.load_profile("tessera")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of this directory first: of several processes, one would work at their long tests alone at the end."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
