"""Logs as JSON: every line an object, and the lines of a request under its id."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.errors import ExitCode
from service.logs import JsonFormatter, configure_logging, current_request_id
from tests.service.process import ServerProcess


def line_of(**attributes: Any) -> dict[str, Any]:
    record = logging.makeLogRecord({"name": "a.b", "levelno": 20, "levelname": "INFO", "msg": "x %s", "args": ("y",)})
    record.__dict__.update(attributes)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)  # type: ignore[no-any-return]


def test_a_line_has_a_time_a_level_a_logger_and_a_message() -> None:
    line = line_of(created=0.5)
    assert line == {"time": "1970-01-01T00:00:00.500+00:00", "level": "info", "logger": "a.b", "message": "x y"}


def test_fields_stand_in_place_of_the_message() -> None:
    line = line_of(fields={"id": "r1", "status": 200, "ttft_ms": 1.5, "path": '/"\n'})
    assert (line["request_id"], line["status"], line["ttft_ms"], line["path"]) == ("r1", 200, 1.5, '/"\n')
    assert "message" not in line


def test_a_line_belongs_to_the_request_it_was_written_for() -> None:
    token = current_request_id.set("r2")
    assert line_of()["request_id"] == "r2"
    current_request_id.reset(token)
    assert "request_id" not in line_of()


def test_an_exception_stays_on_its_line() -> None:
    line = line_of(exc_info=(ValueError, ValueError("broken"), None))
    assert "ValueError: broken" in line["exception"]


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """Leaves the process's logging as it was."""
    root, hook = logging.getLogger(), sys.excepthook
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:], sys.excepthook = before, hook
    root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(logging.NOTSET)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("_own_logging")
def test_what_nobody_catches_is_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    sys.excepthook(ValueError, ValueError("broken"), None)
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("critical", "uncaught error")
    assert "broken" in line["exception"]


def test_a_server_writes_nothing_but_objects_and_hides_its_command_lines_key() -> None:
    environment = {"TESSERA_API_KEY": "sk-replaced-012345", "TESSERA_NO_SUCH_OPTION": "1"}
    options = ("--local", "--threads", "1", "--log-format", "json", "--log-level", "debug", "--api-key=sk-overridden")
    with ServerProcess(*options, "--api-key", "sk-0123456789", environment=environment) as server:
        command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        assert b"--log-level" in command
        assert b"sk-" not in command
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-0123456789") as client:
            answer = client.completions.create(
                model=client.models.list().data[0].id,
                prompt="Once",
                max_tokens=4,
                n=2,
                extra_body={"ignore_eos": True},
                extra_headers={"X-Request-Id": "mine"},
            )
        assert answer.id == "mine"
        assert httpx.post(f"{server.url}/v1/completions", timeout=60).status_code == 401
        server.signal(signal.SIGTERM)
        assert server.wait() == ExitCode.OK
        output = server.output
    lines = [json.loads(line) for line in output.splitlines()]
    assert all({"time", "level", "logger"} <= line.keys() for line in lines)
    assert any("TESSERA_NO_SUCH_OPTION is ignored" in line.get("message", "") for line in lines)
    access = {line["request_id"]: line for line in lines if line["logger"] == "tessera.access"}
    mine = access.pop("mine")
    expected = {"method": "POST", "path": "/v1/completions", "route": "/v1/completions", "status": 200}
    expected |= {"client": "127.0.0.1", "completion_tokens": 8, "finish": "length,length"}
    assert {name: mine[name] for name in expected} == expected
    assert mine["key"].startswith("key-")
    assert 0 < mine["ttft_ms"] <= mine["ms"]
    assert {"prompt_tokens", "queue_ms", "prefill_ms", "decode_ms"} <= mine.keys()
    assert sorted(line["status"] for line in access.values()) == [200, 401]
    assert "sk-" not in output
