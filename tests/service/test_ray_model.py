"""A replica on a machine without the checkpoint gets it from a server, on a real Ray of two nodes, or says why not."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from model.fingerprint import WEIGHTS_FILE, identify
from service.errors import ModelNotFoundError
from service.ray_cluster import RayCluster
from service.settings import DEFAULT_MODEL
from tests.service.process import ServerProcess

if TYPE_CHECKING:
    from service.ray_model import LoadChecked

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

NAME = "sent"
APP = f"tessera-{NAME}"
# More than the first node has, so that engines go to the second.
NUM_CPUS = 12
OPTIONS = ("--threads", str(NUM_CPUS), "--served-model-name", NAME)
REQUEST = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
SHIPPED = identify(DEFAULT_MODEL)


@contextmanager
def second_node(address: str, cache: Path) -> Iterator[None]:
    """Another node of the cluster on this machine, whose user has its caches elsewhere."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        gcs_address=address,
        num_cpus=NUM_CPUS,
        num_gpus=0,
        node_ip_address="127.0.0.1",
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
        object_store_memory=100 * 2**20,
        include_log_monitor=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    try:
        yield
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def presences_of(app: str) -> list[Any]:
    from service.ray_frontends import presences

    return presences(app)


def offers() -> bool:
    """Whether a server is there and has opened its files."""
    import ray

    return any(ray.get(actor.sizes.remote(), timeout=120) for actor in presences_of(APP))


def serve_from_elsewhere(address: str, directory: Path) -> None:
    """By the time that an engine finds room, on a second node, the model is not any more where the server said."""
    here, link, cache = directory / "here", directory / "model", directory / "cache"
    shutil.copytree(DEFAULT_MODEL, here)
    link.symlink_to(here)
    server = ServerProcess("--ray-address", address, *OPTIONS, "--model", str(link))
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        starting = threads.submit(stack.enter_context, server)
        until(offers)
        here.rename(directory / "there")
        link.unlink()
        link.symlink_to(directory / "there")
        stack.enter_context(second_node(address, cache))
        starting.result()
        answer = httpx.post(server.url + "/v1/completions", json=REQUEST, timeout=60).json()
        assert answer["system_fingerprint"].startswith(SHIPPED.fingerprint[:12])
        assert answer["usage"]["completion_tokens"] == REQUEST["max_tokens"]
        [copy] = [path for path in (cache / "tessera" / "models").iterdir() if path.is_dir()]
        assert identify(copy) == SHIPPED
        server.signal(signal.SIGKILL)
        server.wait()
        until(lambda: not presences_of(APP))
        # As a replica does that is replaced there, now that nobody could send it.
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("XDG_CACHE_HOME", str(cache))
        assert load_of(APP)._copy(here) == copy


async def test_an_engine_on_another_node_gets_its_checkpoint_from_the_server_and_keeps_it(
    cluster: RayCluster, tmp_path: Path
) -> None:
    import ray
    from ray import serve

    try:
        await asyncio.to_thread(serve_from_elsewhere, ray.get_runtime_context().gcs_address, tmp_path)
    finally:
        await asyncio.to_thread(serve.delete, APP)


@pytest.fixture
def app(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of an application; what is copied for it goes into a directory of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"app-{uuid.uuid4().hex}"


def offer(app: str, directory: Path) -> Any:
    """The actor of a server of `app`, once it has opened the files."""
    import ray

    from service.ray_frontends import _Presence, _start

    actor = _start(_Presence, f"{app}:{uuid.uuid4().hex}", {}, directory)
    assert ray.get(actor.sizes.remote(), timeout=120)
    return actor


def load_of(app: str, max_copy_bytes: int = 1 << 30) -> LoadChecked:
    from service.ray_model import LoadChecked

    return LoadChecked(app, SHIPPED, max_copy_bytes)


async def test_a_checkpoint_that_was_changed_after_it_was_offered_is_refused(app: str, tmp_path: Path) -> None:
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    actor = offer(app, tmp_path / "model")
    with (tmp_path / "model" / WEIGHTS_FILE).open("r+b") as file:
        file.seek(9 << 20)
        byte = file.read(1)
        file.seek(9 << 20)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelNotFoundError, match=f"that was sent is not {SHIPPED}"):
        load_of(app)._copy(tmp_path / "nothing")
    assert [path.name for path in (tmp_path / "cache" / "tessera" / "models").iterdir()] == ["lock"]
    end(actor)


async def test_where_a_server_ends_meanwhile_another_goes_on(app: str) -> None:
    from service.ray_model import _Servers

    actors = [offer(app, DEFAULT_MODEL) for _ in range(2)]
    servers = _Servers(app, "not here")
    servers.sizes()
    pieces = servers.pieces(WEIGHTS_FILE)
    first = next(pieces)
    end(servers._actors[0])
    assert first + b"".join(pieces) == (DEFAULT_MODEL / WEIGHTS_FILE).read_bytes()
    assert len(servers._actors) == 1
    for actor in actors:
        end(actor)


async def test_where_nobody_has_it_the_error_says_who_misses_what(app: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"{tmp_path}.* is missing or another than .*no server is there"):
        load_of(app)._copy(tmp_path)
    with pytest.raises(ModelNotFoundError, match="--model-copies is 0"):
        load_of(app, 0)._copy(tmp_path)


def end(actor: Any) -> None:
    import ray

    ray.kill(actor)
