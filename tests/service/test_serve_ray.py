"""`tessera serve` as a process: a Ray of its own that starts, serves, keeps to itself, drains and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from service.errors import ExitCode
from service.ray_cluster import _RunDir
from tests.service.process import ServerProcess, clean_environment
from tests.service.ray_processes import cpu_seconds, listeners, processes_of, run_directory, wait_until_gone

# The promise is 30 s on two cores. CPU time, unlike the clock, does not depend on who else is at work.
MAX_START_UP_CPU_S = 30.0
# They are killed; what is left alone looks for its dead cluster for a minute.
GONE_WITHIN_S = 30.0
STREAM = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--threads", "1") as server:
        yield server


@pytest.fixture(scope="module")
def directory(server: ServerProcess) -> Path:
    found = run_directory(server.process.pid)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def processes(server: ServerProcess, directory: Path) -> dict[int, str]:
    """Everything that belongs to the server, the launcher included."""
    return processes_of(directory)


def events(lines: Iterator[str]) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]


def test_it_starts_quickly(processes: dict[int, str]) -> None:
    assert cpu_seconds(processes) < MAX_START_UP_CPU_S


def test_a_stream_is_the_answer_in_pieces(server: ServerProcess) -> None:
    request = STREAM | {"max_tokens": 40, "temperature": 0}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=request) as stream:
            chunks = events(stream.iter_lines())
        whole = client.post("/v1/completions", json=request | {"stream": False}).json()
    pieces = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    assert len(pieces) > 10
    assert "".join(pieces) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 40


def test_every_kind_of_field_comes_through(server: ServerProcess) -> None:
    body = {
        "prompt": "Once upon a time, the 🦊",
        "max_tokens": 30,
        "logprobs": 3,
        "echo": True,
        "return_token_ids": True,
        "typical_p": 0.9,
        "frequency_penalty": 0.5,
        "bad_words": ["girl"],
        "logit_bias": {"11": -2},
        "priority": 2,
        "cache_salt": "pepper",
        "seed": 5,
    }
    with httpx.Client(base_url=server.url, timeout=60) as client:
        [written] = client.post("/v1/completions", json=body).json()["choices"]
        ids = [*written["prompt_token_ids"], *written["token_ids"]]
        scored = client.post("/v1/completions", json=body | {"prompt": ids, "max_tokens": 0}).json()["choices"][0]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            pieces = [chunk["choices"][0] for chunk in events(stream.iter_lines())]
        late = client.post("/v1/completions", json=STREAM | {"stream": False, "timeout": 0.05, "n": 8}).json()
    assert scored["logprobs"] == written["logprobs"]
    assert [token for piece in pieces for token in piece["token_ids"]] == written["token_ids"]
    for name, array in written["logprobs"].items():
        assert [entry for piece in pieces for entry in piece["logprobs"][name]] == array
    assert "girl" not in written["text"]
    assert {choice["finish_reason"] for choice in late["choices"]} == {"deadline"}
    assert late["usage"]["completion_tokens"] < 8 * 300


def test_a_text_is_held_to_a_grammar_on_the_replica(server: ServerProcess) -> None:
    pattern = r"[a-z]{3}: \d{1,4}"
    request = {"prompt": "Once", "n": 3, "seed": 1, "max_tokens": 40, "structured_outputs": {"regex": pattern}}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        choices = client.post("/v1/completions", json=request).json()["choices"]
        refused = client.post("/v1/completions", json={"prompt": "Once", "guided_regex": "("})
    assert all(re.fullmatch(pattern, choice["text"]) for choice in choices)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guided_regex")


def metric(server: ServerProcess, name: str) -> float:
    """The value of a metric of the one replica."""
    lines = httpx.get(server.url + "/metrics", timeout=60).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"mosaic_{name}{{"))


def test_a_client_that_goes_away_frees_the_replica(server: ServerProcess) -> None:
    request = STREAM | {"n": 32, "max_tokens": 480}
    with httpx.stream("POST", server.url + "/v1/completions", json=request, timeout=60) as stream:
        next(stream.iter_lines())
    time.sleep(0.5)  # for what was still on its way to the replica
    assert metric(server, "num_requests_running") + metric(server, "num_requests_waiting") == 0
    assert metric(server, "memory_usage_ratio") == 0
    assert metric(server, "engine_generation_tokens_total") < 32 * 480 / 2


def test_nothing_of_it_can_be_reached_from_elsewhere(server: ServerProcess, processes: dict[int, str]) -> None:
    found = listeners(processes)
    open_to_all = [listener for listener in found if not listener.is_loopback]
    # Serve opens one port of each replica to the network, whatever it is told; it asks for the token.
    assert all("ServeReplica" in listener.process for listener in open_to_all)
    for listener in open_to_all:
        assert answer_of(listener.port, "/ray.serve.ASGIService/HandleRequest") is grpc.StatusCode.UNAUTHENTICATED
    assert server.port in [listener.port for listener in found if listener.is_loopback]


def answer_of(port: int, method: str, token: str | None = None) -> grpc.StatusCode:
    """What one of Ray's processes says to a call without arguments."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


# Who holds the cluster together, who starts processes on this machine, who runs code, who reads logs.
RAY_CALLS = (
    "/ray.rpc.NodeInfoGcsService/GetClusterId",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/GetTraceback",
)


def test_ray_does_nothing_without_the_token(directory: Path, processes: dict[int, str]) -> None:
    """Joining the cluster begins with the first of these calls."""
    ports = [listener.port for listener in listeners(processes)]
    unserved = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE}
    token = (directory / "token").read_text()
    for method in RAY_CALLS:
        serving = [port for port in ports if answer_of(port, method) not in unserved]
        assert serving, f"nobody knows {method}"
        for port in serving:
            assert answer_of(port, method) is grpc.StatusCode.UNAUTHENTICATED
            assert answer_of(port, method, "0" * len(token)) is grpc.StatusCode.UNAUTHENTICATED
            assert answer_of(port, method, token) is not grpc.StatusCode.UNAUTHENTICATED


def test_rays_dashboard_is_not_there_and_its_agents_ask_for_the_token(processes: dict[int, str]) -> None:
    found = listeners(processes)
    assert 8265 not in [listener.port for listener in found]
    agents = [listener.port for listener in found if "Agent" in listener.process]
    answers = []
    for port in agents:
        with contextlib.suppress(httpx.TransportError):  # the port speaks gRPC
            answers.append(httpx.get(f"http://127.0.0.1:{port}/api/actors", timeout=60).status_code)
    assert answers
    assert set(answers) == {401}


def test_its_token_is_private(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "token").stat().st_mode) == 0o600
    assert not (Path.home() / ".ray" / "auth_token").exists()


def test_a_signal_lets_a_stream_end_and_leaves_nothing_behind(
    server: ServerProcess, directory: Path, processes: dict[int, str]
) -> None:
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=STREAM) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        server.signal()
        while client.get("/readyz").status_code == 200:
            time.sleep(0.01)
        refused = client.post("/v1/completions", json=STREAM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        last = events(lines)[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert server.wait(timeout_s=60) == ExitCode.OK
    wait_until_gone(processes, timeout_s=GONE_WITHIN_S)
    assert not directory.exists()
    assert "Traceback" not in server.output


def _knows(pid: int, secret: str) -> bool:
    """Whether a process was started with a secret in its environment or on its command line."""
    files = [Path(f"/proc/{pid}/{name}") for name in ("environ", "cmdline")]
    return any(secret.encode() in file.read_bytes() for file in files)


def start() -> tuple[subprocess.Popen[bytes], Path]:
    """A launcher that has begun to start Ray, and its directory."""
    command = [sys.executable, "-m", "service", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environment())
    while (directory := run_directory(process.pid)) is None:
        assert process.poll() is None
        time.sleep(0.02)
    return process, directory


def test_a_signal_during_start_up_leaves_nothing_behind() -> None:
    process, directory = start()
    while len(processes := processes_of(directory)) < 2:  # until Ray has begun to start processes
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == ExitCode.INTERRUPTED
    wait_until_gone(processes, timeout_s=GONE_WITHIN_S)
    assert not processes_of(directory)
    assert not directory.exists()


def test_a_killed_launcher_takes_its_replicas_with_it_and_the_next_one_cleans_up() -> None:
    secret = "sk-0123456789"
    options = ("--threads", "1", "--log-format", "json", "--api-key", secret)
    with ServerProcess(*options, timeout_s=120) as server:
        directory = run_directory(server.process.pid)
        assert directory is not None
        processes = processes_of(directory)
        assert httpx.get(server.url + "/v1/models", timeout=60).status_code == 401
        models = httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {secret}"}, timeout=60)
        assert models.status_code == 200
        keepers = {pid for pid in processes if pid != server.process.pid and _knows(pid, secret)}
        assert not keepers, "a process of Ray's has been told an API key"
        assert not any(secret in path.read_text(errors="replace") for path in directory.rglob("*") if path.is_file())
        assert all(json.loads(line) for line in server.output.splitlines())
        replicas = [pid for pid, title in processes.items() if "ServeReplica" in title]
        assert replicas
        server.signal(signal.SIGKILL)
        server.wait()
    wait_until_gone(replicas, timeout_s=60)
    # Ray's agents look for their dead cluster for a minute, unless the next launcher ends that.
    _RunDir().remove()
    wait_until_gone(processes, timeout_s=GONE_WITHIN_S)
    assert not directory.exists()
