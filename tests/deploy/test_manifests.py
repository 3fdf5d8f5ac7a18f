"""The files of `deploy/` for Ray Serve and Kubernetes, against the schemas of those who read them, and each other."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.strict_schema import Schema, faults
from tests.dockerfile import parse

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VARIANTS = {"cpu": KUBERNETES / "rayservice-cpu.yaml", "gpu": KUBERNETES / "rayservice-gpu.yaml"}
# Not in the repository: beside it, where it is developed and tested.
CRD = Path("shared", "reference", "rayservices_crd.yaml.xz")

Document = dict[str, Any]


def load(path: Path) -> Document:
    document: Document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


SERVE = load(DEPLOY / "serve.yaml")
SERVICES = {name: load(path) for name, path in VARIANTS.items()}
SERVE_CONFIGS = {name: yaml.safe_load(document["spec"]["serveConfigV2"]) for name, document in SERVICES.items()}
POLICIES: list[Document] = list(yaml.safe_load_all((KUBERNETES / "policies.yaml").read_text(encoding="utf-8")))
ALL_CONFIGS = {"serve.yaml": SERVE, **SERVE_CONFIGS}


def environment() -> dict[str, str]:
    """What deploy/ray.env sets."""
    lines = (DEPLOY / "ray.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def crd() -> Schema:
    """The schema of a RayService."""
    for directory in ROOT.parents:
        if (directory / CRD).is_file():
            with lzma.open(directory / CRD) as file:
                document = yaml.load(file, yaml.CSafeLoader)
            [version] = [each for each in document["spec"]["versions"] if each["name"] == "v1"]
            schema: Schema = version["schema"]["openAPIV3Schema"]
            return schema
    pytest.skip(f"no {CRD} beside the repository")


# Of what Kubernetes itself defines, as much as is used here.
def thing(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
SELECTOR = {"type": "object", "properties": {"matchLabels": LABELS}}
PEER = {"type": "object", "properties": {"podSelector": SELECTOR, "namespaceSelector": SELECTOR}}
PORT = thing(protocol={"enum": ["TCP"]}, port={"type": "integer"})
RULE = {
    "type": "object",
    "properties": {"from": {"type": "array", "items": PEER}, "ports": {"type": "array", "items": PORT}},
}
NAMED = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": thing(name={}, labels=LABELS)}
SPECS: dict[str, tuple[str, Schema]] = {
    "PodDisruptionBudget": ("policy/v1", thing(maxUnavailable={"type": "integer"}, selector=SELECTOR)),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        thing(podSelector=SELECTOR, policyTypes={"enum": [["Ingress"]]}, ingress={"type": "array", "items": RULE}),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_service_is_what_the_operator_understands(crd: Schema, variant: str) -> None:
    assert faults(SERVICES[variant], crd) == []
    assert SERVICES[variant]["apiVersion"] == "ray.io/v1"
    assert SERVICES[variant]["metadata"].keys() <= {"name", "labels"}


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("spec",), "serveConfigV3"),
        (("spec", "rayClusterConfig", "headGroupSpec"), "rayStartParam"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "readyProbe"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "emptyDir"), "size"),
    ],
)
def test_a_key_that_the_operator_would_drop_is_seen(crd: Schema, path: tuple[Any, ...], key: str) -> None:
    document: Any = copy.deepcopy(SERVICES["cpu"])
    part = document
    for step in path:
        part = part[step]
    part[key] = "x"
    found = faults(document, crd)
    assert found
    assert all(repr(key) in fault for fault in found)


# In a process of its own: Ray reads its environment when it is imported.
ASK_RAY = """
import importlib, json, sys
from ray.serve.schema import ServeDeploySchema
for config in json.load(sys.stdin):
    [application] = ServeDeploySchema.model_validate(config).applications
    module, builder = application.import_path.split(":")
    getattr(importlib.import_module(module), builder)(application.args)
print(json.dumps(ServeDeploySchema.model_json_schema()))
"""


@pytest.fixture(scope="module")
def serve_schema() -> Schema:
    """The schema of the installed Ray, which has read all configurations and built their applications."""
    configs = json.dumps(list(ALL_CONFIGS.values()))
    done = subprocess.run([sys.executable, "-c", ASK_RAY], input=configs, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    schema: Schema = json.loads(done.stdout.splitlines()[-1])
    return schema


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_a_configuration_is_what_the_installed_ray_understands(serve_schema: Schema, name: str) -> None:
    config = ALL_CONFIGS[name]
    assert faults(config, serve_schema) == []
    deployments = config["applications"][0]["deployments"]
    assert {deployment["name"] for deployment in deployments} <= {"Gateway", "Engine"}
    broken = copy.deepcopy(config)
    broken["applications"][0]["deployments"][0]["max_replica"] = 3
    assert any("'max_replica'" in fault for fault in faults(broken, serve_schema))


def test_what_the_network_can_reach_asks_for_keys() -> None:
    for name, config in ALL_CONFIGS.items():
        arguments = config["applications"][0]["args"]
        if config["http_options"]["host"] != "127.0.0.1":
            mounts = containers(SERVICES[name])["ray-worker"]["volumeMounts"]
            assert any(arguments["api_key_file"].startswith(mount["mountPath"] + "/") for mount in mounts)


def pods(service: Document) -> list[Document]:
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def containers(service: Document) -> dict[str, Document]:
    return {container["name"]: container for pod in pods(service) for container in pod["spec"]["containers"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_are_bounded_watched_and_without_privileges(variant: str) -> None:
    for pod in pods(SERVICES[variant]):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
        assert pod["spec"]["enableServiceLinks"] is False, "a Service called tessera would set TESSERA_PORT"
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
            volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_a_service_fit_each_other(variant: str) -> None:
    service, config = SERVICES[variant], SERVE_CONFIGS[variant]
    cluster, arguments = service["spec"]["rayClusterConfig"], config["applications"][0]["args"]
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    worker = containers(service)["ray-worker"]
    annotations = pods(service)[1]["metadata"]["annotations"]
    assert worker["ports"][0]["containerPort"] == config["http_options"]["port"] == 8000
    assert worker["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000}
    assert (annotations["prometheus.io/port"], annotations["prometheus.io/path"]) == ("8000", "/metrics")
    assert arguments["public_metrics"] is True, "Prometheus has no key"
    # The time to end is longer than the pause before and the draining together.
    pause = int(worker["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pods(service)[1]["spec"]["terminationGracePeriodSeconds"] > pause + arguments["drain_timeout"]
    # An engine and a gateway fit a worker.
    assert arguments["threads"] + 0.5 <= int(worker["resources"]["limits"]["cpu"])
    assert str(arguments.get("num_gpus", 0)) == worker["resources"]["limits"].get("nvidia.com/gpu", "0")
    [group] = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # As many workers may come as replicas may be wanted.
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["maxReplicas"]) == (1, arguments["max_replicas"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_container_has_rays_environment(variant: str) -> None:
    """The token's mode is the operator's to set."""
    expected = {name: value for name, value in environment().items() if name != "RAY_AUTH_MODE"}
    for container in containers(SERVICES[variant]).values():
        assert {entry["name"]: entry["value"] for entry in container["env"]} == expected
    assert environment()["RAY_AUTH_MODE"] == "token"


def test_the_two_variants_differ_in_what_concerns_gpus_alone() -> None:
    differing = set(VARIANTS["cpu"].read_text().splitlines()) ^ set(VARIANTS["gpu"].read_text().splitlines())
    words = ("gpu", "GPU", "CPUs", "tolerations:", "image:", "threads:", "memory:", "takes over once it serves")
    assert [line for line in differing if not any(word in line for word in words)] == []


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["metadata"]["name"])
def test_a_policy_is_what_kubernetes_understands(policy: Document) -> None:
    version, spec = SPECS[policy["kind"]]
    schema = {"type": "object", "properties": {**NAMED, "spec": spec}, "required": [*NAMED, "spec"]}
    assert faults(policy, schema) == []
    assert policy["apiVersion"] == version


def test_policies_are_about_the_pods_that_there_are() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods(SERVICES["cpu"])]
    assert labels == [pod["metadata"]["labels"] for pod in pods(SERVICES["gpu"])]
    budgets = [policy["spec"] for policy in POLICIES if policy["kind"] == "PodDisruptionBudget"]
    for label in labels:
        assert sum(budget["selector"]["matchLabels"].items() <= label.items() for budget in budgets) == 1
    [network] = [policy["spec"] for policy in POLICIES if policy["kind"] == "NetworkPolicy"]
    assert all(network["podSelector"]["matchLabels"].items() <= label.items() for label in labels)
    open_to_all = [rule["ports"] for rule in network["ingress"] if "from" not in rule]
    assert open_to_all == [[{"protocol": "TCP", "port": 8000}]]


def test_images_are_those_that_the_dockerfile_makes() -> None:
    final = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))[-1]
    assert final.last("USER").text == "10001:10001"
    version = importlib.metadata.version("tessera-mosaics")
    images = {name: {c["image"] for c in containers(service).values()} for name, service in SERVICES.items()}
    assert images == {"cpu": {f"tessera:{version}"}, "gpu": {f"tessera:{version}-cuda"}}
    # A login shell, as operators start, does not see the PATH of the image.
    assert "ln -s /home/tessera/.venv/bin/ray /usr/local/bin/ray" in final.all("RUN")[0].text
