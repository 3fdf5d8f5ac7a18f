"""What holds for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# How long an example takes tells of the machine's other work.
settings.register_profile("tessera", deadline=None)
settings.load_profile("tessera")

# Files whose tests start a Ray, besides those that are called after it.
_WITH_RAY = {"test_chaos.py", "test_serve_cluster.py", "test_serve_ray.py", "test_tracing.py"}


class FilesAndRay(LoadFileScheduling):
    """Whole files to each of several processes, and all files that start a Ray to one: two Rays at a time get into each
    other's way.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = super()._split_scope(nodeid)
        return "ray" if _starts_ray(Path(path)) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesAndRay:
    return FilesAndRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a Ray first, then the long tests of this directory: else one of several processes would work at them
    alone at the end.
    """
    here = Path(__file__).parent
    items.sort(key=lambda item: (not _starts_ray(item.path), item.path.parent != here))


def _starts_ray(path: Path) -> bool:
    return path.name in _WITH_RAY or path.name.startswith("test_ray_")
