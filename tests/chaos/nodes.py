"""deploy/serve.yaml on two nodes of Ray on this machine: `python -m tests.chaos.nodes --port PORT`.

The head node has the proxy, two gateways and an engine, the second node has an engine. A second node that ends is
replaced, as by whoever keeps a cluster.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

from loadtests.server import free_port
from tests.service.ray_processes import processes_of
from tests.service.shipped import configuration, environment

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

_OBJECT_STORE_BYTES = 100 * 2**20
_HEAD = {"engine": 1, "front": 2}
_SECOND = {"engine": 1}


def main() -> None:
    """Serves until a signal."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    # Sockets have short paths.
    directory = Path(tempfile.mkdtemp(prefix="tn-", dir="/tmp"))
    (directory / "proxy").mkdir()
    # Ray reads it when it is imported.
    os.environ |= environment(directory)
    try:
        _serve(directory, int(sys.argv[sys.argv.index("--port") + 1]))
    finally:
        for pid in processes_of(directory, but=os.getpid()):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def _serve(directory: Path, port: int) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    _add_node(cluster, _HEAD, temp_dir=str(directory / "ray"), gcs_server_port=free_port())
    second = _add_node(cluster, _SECOND)
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(_pinned(configuration(port))))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", cluster.address, str(path)]
    with subprocess.Popen(command) as serving:
        try:
            while serving.poll() is None:
                time.sleep(0.1)
                if not second.remaining_processes_alive():
                    cluster.remove_node(second, allow_graceful=False)
                    second = _add_node(cluster, _SECOND)
        finally:
            serving.kill()


def _add_node(cluster: Cluster, resources: Mapping[str, float], **more: Any) -> Any:
    return cluster.add_node(
        num_cpus=4,
        resources=dict(resources),
        object_store_memory=_OBJECT_STORE_BYTES,
        node_ip_address="127.0.0.1",
        include_dashboard=False,
        **more,
    )


def _pinned(shipped: dict[str, Any]) -> dict[str, Any]:
    """With one engine a node, and the gateways on the head node."""
    shipped["proxy_location"] = "HeadOnly"
    application = shipped["applications"][0]
    del application["args"]["max_replicas"]
    application["args"] |= {"memory": "24MiB", "max_num_seqs": 16, "max_num_waiting": 64, "resume_timeout": 60}
    gateway = application["deployments"][0]
    gateway["ray_actor_options"] = {"num_cpus": 0.5, "resources": {"front": 1}}
    engine = {"name": "Engine", "num_replicas": 2}
    engine["ray_actor_options"] = {"num_cpus": 0.5, "resources": {"engine": 1}}
    application["deployments"].append(engine)
    return shipped


def _stop(_: int, __: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
