"""`tessera serve` behind TLS and on a Unix socket, as processes; and what stops it before anything slow."""

from __future__ import annotations

import re
import shutil
import signal
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest

from service.errors import AddressError, UsageError
from service.front_door import open_front_door
from service.settings import load_settings
from tests.gateway.certificates import make_certificate, trusting
from tests.service.process import ServerProcess


def test_the_official_client_over_tls_and_a_new_certificate_on_a_signal(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    options = ("--local", "--threads", "1", "--ssl-certfile", str(cert), "--ssl-keyfile", str(key))
    with ServerProcess(*options, environment={"TESSERA_API_KEY": "sk-0123456789"}) as server:
        assert server.url.startswith("https://127.0.0.1:")
        transport = openai.DefaultHttpxClient(verify=trusting(cert))
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-0123456789", http_client=transport) as client:
            stream = client.completions.create(model=client.models.list().data[0].id, prompt="Once", stream=True)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        renewed = make_certificate(tmp_path, "renewed")
        for file, new in zip((cert, key), renewed, strict=True):
            new.replace(file)
        server.signal(signal.SIGHUP)
        context, deadline = trusting(cert), time.monotonic() + 10
        while not _answers(server.url, context):
            assert time.monotonic() < deadline, server.output
        assert "sk-0123456789" not in server.output


def _answers(url: str, context: ssl.SSLContext) -> bool:
    try:
        return httpx.get(f"{url}/livez", verify=context, timeout=60).status_code == 200
    except httpx.ConnectError:
        return False


def test_a_unix_socket_serves_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "tessera.sock"
    with ServerProcess("--local", "--threads", "1", "--uds", str(path), "--uds-mode", "660") as server:
        assert server.url == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            answer = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        if shutil.which("curl"):
            [line] = [line for line in server.output.splitlines() if line.strip().startswith("curl ")]
            command = f"{line.strip()} --silent --fail"
            assert subprocess.run(command, shell=True, capture_output=True, timeout=60, check=True).stdout
        assert server.stop() == 0
    assert not path.exists()


def test_the_command_to_copy_fits_the_door(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    tls = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    for given, command in (
        ({"port": 0}, r"curl http://127\.0\.0\.1:\d+/x"),
        ({"port": 0, **tls}, r"curl https://127\.0\.0\.1:\d+/x"),
        ({"uds": str(tmp_path / "a b")}, rf"curl --unix-socket '{tmp_path}/a b' http://localhost/x"),
        ({"uds": str(tmp_path / "s"), **tls}, rf"curl --unix-socket {tmp_path}/s https://localhost/x"),
        ({"port": 0, "api_key": "k"}, r'curl http:\S+/x -H "Authorization: Bearer \$TESSERA_API_KEY"'),
    ):
        with open_front_door(load_settings(given, {}, None)) as door:
            assert re.fullmatch(command, door.curl("/x"))


def test_strange_names_are_refused_where_nothing_else_keeps_strangers_out(tmp_path: Path) -> None:
    for given, names in (
        ({}, ("localhost", "127.0.0.1")),
        ({"host": "localhost"}, ("localhost", "localhost")),
        ({"host": "0.0.0.0"}, ()),
        ({"api_key": "k"}, ()),
        ({"uds": str(tmp_path / "s")}, ()),
        ({"allowed_hosts": "a.example, *.b.example"}, ("a.example", "*.b.example")),
        ({"host": "0.0.0.0", "api_key": "k", "allowed_hosts": "a.example"}, ("a.example",)),
    ):
        with open_front_door(load_settings({"port": 0, **given}, {}, None)) as door:
            assert door.allowed_hosts == names


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"ssl_keyfile": "k"}, UsageError, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_certfile": "/nowhere/c.pem"}, UsageError, r"^--ssl-certfile: /nowhere/c\.pem: No such file"),
        ({"ssl_certfile": __file__}, UsageError, r"^--ssl-certfile: .*test_front_door\.py: "),
        ({"uds": "/nowhere/s"}, AddressError, "cannot listen on /nowhere/s: No such file"),
        ({"uds": __file__}, AddressError, "is there and is no socket"),
        ({"uds_mode": "999"}, UsageError, "pattern"),
        ({"root_path": "tessera/"}, UsageError, "pattern"),
        ({"host": "192.0.2.1", "port": 80}, AddressError, "cannot listen on 192.0.2.1 port 80"),
    ],
)
def test_what_is_wrong_is_known_before_anything_slow(
    given: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words), open_front_door(load_settings(given, {}, None)):
        pass
