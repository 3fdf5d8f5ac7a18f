"""`tessera serve --local` as a process: start, the request it prints, draining, the end."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from service.errors import ExitCode
from tests.service.process import ServerProcess, clean_environment

# The promise is 5 s on two idle cores. CPU time, unlike the clock, does not depend on who else is at work.
MAX_START_UP_CPU_S = 5.0


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--local", "--threads", "1") as server:
        yield server


def test_it_starts_quickly(server: ServerProcess) -> None:
    assert server.start_up_cpu_s < MAX_START_UP_CPU_S


def test_the_printed_request_works_as_it_is(server: ServerProcess) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = re.search(r"^ *(curl .*)$", server.output, re.MULTILINE)
    assert line is not None
    answer = subprocess.run([*shlex.split(line[1]), "--silent"], capture_output=True, timeout=60, check=True)
    completion = json.loads(answer.stdout)
    assert completion["choices"][0]["text"]
    assert completion["usage"]["completion_tokens"] <= 64


def test_usage_tells_what_was_cached_and_nothing_else_does(server: ServerProcess) -> None:
    def ask(**fields: object) -> tuple[int, list[dict[str, object]]]:
        body = {"max_tokens": 20, "logprobs": 2, "seed": 3, **fields}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"]

    prompt = list(range(300, 430))
    num_cached, first = ask(prompt=prompt)
    assert num_cached == 0
    assert ask(prompt=prompt) == (129, first)
    for expected in (0, 129):
        assert ask(prompt=prompt, cache_salt="mine") == (expected, first)
    assert ask(prompt=prompt, echo=True)[0] == 0, "every token of the prompt is asked about"
    num_cached, four = ask(prompt=prompt[:100], n=4)
    # Whole blocks of what begins alike; what the choices have from each other is not called cached.
    assert num_cached == 97
    assert ask(prompt=prompt[:100], n=4) == (99, four)
    assert ask(prompt=prompt[:100]) == (99, four[:1])


def test_a_signal_lets_a_stream_end_and_refuses_new_ones(server: ServerProcess) -> None:
    request = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=request) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        server.signal()
        while client.get("/readyz").status_code == 200:
            time.sleep(0.01)
        refused = client.post("/v1/completions", json=request)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert client.get("/livez").status_code == 200
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "error" not in chunks[-1]
    assert server.wait(timeout_s=60) == ExitCode.OK
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/livez")
    assert "Traceback" not in server.output


def test_an_interrupt_while_loading_ends_it_at_once() -> None:
    command = [sys.executable, "-m", "service", "serve", "--local"]
    environment = clean_environment({"TESSERA_PORT": "0"})
    with subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever started pytest may have it ignored, as shells do for what runs in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        # Where tests use gRPC too, it may have its say about the fork first.
        assert any(line.startswith("Loading ") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == ExitCode.INTERRUPTED
        assert "Traceback" not in process.stderr.read()
