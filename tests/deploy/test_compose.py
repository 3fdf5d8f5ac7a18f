"""deploy/docker-compose.yaml: only keys that Compose knows, and three services that find each other and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from service.settings import ServeSettings, env_name
from tests.deploy.strict_schema import Schema, faults

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

# Of the Compose specification, as much as is used.
TEXTS: Schema = {"type": "array", "items": {"type": "string"}}
SERVICE: Schema = {
    "type": "object",
    "properties": {
        "build": {"type": "object", "properties": {"context": {"type": "string"}}},
        "image": {"type": "string", "pattern": r"^[a-z/]+(:v?\d+\.\d+\.\d+)?$"},
        "environment": {"type": "object", "additionalProperties": {"type": "string"}},
        "ports": TEXTS,
        "volumes": TEXTS,
        "depends_on": TEXTS,
        "shm_size": {"type": "string", "pattern": r"^\d+[kmg]b$"},
        "stop_grace_period": {"type": "string", "pattern": r"^\d+s$"},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "cap_drop": TEXTS,
        "security_opt": TEXTS,
    },
    "required": ["image", "cap_drop", "security_opt", "restart"],
}
SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "services": {"type": "object", "additionalProperties": SERVICE},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
    },
    "required": ["services"],
}


def test_every_key_is_one_that_compose_knows() -> None:
    assert faults(COMPOSE, SCHEMA) == []
    assert faults({**COMPOSE, "service": {}}, SCHEMA) != []
    assert faults({"services": {"x": SERVICES["tessera"] | {"port": []}}}, SCHEMA) != []


def test_nothing_listens_beyond_loopback_or_has_privileges() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def mounts(service: str) -> dict[str, str]:
    """What is mounted where: the target to the source."""
    pairs = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {pair[1]: pair[0] for pair in pairs}


def test_what_is_mounted_is_there() -> None:
    for service in ("prometheus", "grafana"):
        for source in mounts(service).values():
            assert (DEPLOY / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"]
    assert (DEPLOY / SERVICES["tessera"]["build"]["context"] / "Dockerfile").is_file()


def test_services_find_each_other() -> None:
    [scrape] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    host, port = scrape["static_configs"][0]["targets"][0].split(":")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "tessera.yml").read_text())["providers"]
    assert mounts("grafana")[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounts("grafana")["/etc/grafana/provisioning"] == "./grafana/provisioning"
    assert mounts("prometheus")["/etc/prometheus"] == "./prometheus"


def test_the_server_has_time_to_drain_and_knows_its_options() -> None:
    tessera = SERVICES["tessera"]
    default = ServeSettings.model_fields["drain_timeout"].default
    assert int(tessera["stop_grace_period"].removesuffix("s")) > default
    assert tessera["environment"].keys() <= {env_name(name) for name in ServeSettings.model_fields}
