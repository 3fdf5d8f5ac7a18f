"""`tessera serve --ray-address`: joins a cluster that is there, and leaves it as it was."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from service.errors import ExitCode
from service.ray_cluster import RayCluster
from tests.service.process import ServerProcess

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


def serve_once(address: str) -> tuple[str, int]:
    """A completion's text, and the exit code after a signal."""
    options = ("--ray-address", address, "--threads", "1", "--served-model-name", "some/model")
    with ServerProcess(*options) as server:
        request = {"prompt": "Once upon a time", "max_tokens": 8}
        answer = httpx.post(server.url + "/v1/completions", json=request, timeout=60).json()
        return answer["choices"][0]["text"], server.stop()


async def test_a_launcher_joins_a_cluster_and_takes_its_application_with_it(cluster: RayCluster) -> None:
    import ray
    from ray import serve

    before = set(serve.status().applications)
    text, code = await asyncio.to_thread(serve_once, ray.get_runtime_context().gcs_address)
    assert text
    assert code == ExitCode.OK
    assert set(serve.status().applications) == before
