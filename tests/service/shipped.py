"""deploy/serve.yaml and deploy/ray.env, changed so that they can be used beside others on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from loadtests.server import free_port
from tests.service.process import clean_environment

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def environment(directory: Path) -> dict[str, str]:
    """deploy/ray.env, all on loopback, and places of its own for what a machine has once."""
    lines = (DEPLOY / "ray.env").read_text(encoding="utf-8").splitlines()
    shipped = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    proxy = directory / "proxy"
    return clean_environment(shipped) | {
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),  # which it listens on all the same
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(directory),
    }


def configuration(port: int) -> dict[str, Any]:
    """deploy/serve.yaml, on a free port and with an engine that leaves a core for the gateways."""
    shipped: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
    shipped["http_options"]["port"] = port
    shipped["applications"][0]["args"]["threads"] = 1
    return shipped
