"""`tessera serve --ray-address`: joins a cluster that is there, alone or with others, and leaves it as it was."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from service.errors import ExitCode
from service.ray_cluster import RayCluster
from tests.service.process import ServerProcess, clean_environment

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

REQUEST = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def options(address: str) -> tuple[str, ...]:
    return ("--ray-address", address, "--threads", "1", "--served-model-name", "some/model")


def completion(server: ServerProcess) -> str:
    answer = httpx.post(server.url + "/v1/completions", json=REQUEST, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def samples(server: ServerProcess, name: str) -> Iterator[tuple[str, float]]:
    """The label and value of what a server tells, where a metric has one label."""
    for line in httpx.get(server.url + "/metrics", timeout=60).text.splitlines():
        if line.startswith(f"mosaic_{name}{{"):
            label, _, value = line.rpartition(" ")
            yield label, float(value)


def apps() -> set[str]:
    from ray import serve

    return set(serve.status().applications)


def refuse(address: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a server that wants other engines under the same name."""
    command = [sys.executable, "-m", "service", "serve", *options(address), "--max-num-seqs", "7", "--port", "0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean_environment())


def serve_together(address: str) -> None:
    """Two servers share one engine; the first is killed, a third comes and goes, the second ends as the last."""
    before = apps()
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        servers = (ServerProcess(*options(address)) for _ in range(2))
        first, second = threads.map(stack.enter_context, servers)  # both at once
        assert completion(first) == completion(second)
        completion(second)
        [engine] = samples(first, "engine_generation_tokens_total")
        assert [engine] == list(samples(second, "engine_generation_tokens_total")), "one engine, which nobody replaced"
        assert engine[1] == 3 * 12
        told = [[value for _, value in samples(server, "generation_tokens_total")] for server in (first, second)]
        assert told == [[12.0], [24.0]], "each its own"
        refused = refuse(address)
        assert refused.returncode == ExitCode.USAGE, refused.stderr
        assert "--max-num-seqs is 64 there and 7 here" in refused.stderr
        first.signal(signal.SIGKILL)
        first.wait()
        completion(second)
        with ServerProcess(*options(address)) as third:
            completion(third)
            assert third.stop() == ExitCode.OK
        completion(second)
        assert list(samples(second, "engine_generation_tokens_total")) == [(engine[0], 6 * 12)]
        assert second.stop() == ExitCode.OK
    assert apps() == before


async def test_servers_share_the_engines_of_a_cluster_and_the_last_one_takes_them_with_it(cluster: RayCluster) -> None:
    import ray

    await asyncio.to_thread(serve_together, ray.get_runtime_context().gcs_address)
