"""One Ray for all tests of this process: it takes seconds to start, and a process can start it only once."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from service.ray_cluster import RayCluster


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster() -> AsyncIterator[RayCluster]:
    cluster = RayCluster(num_cpus=8)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()
