"""`tessera batch` on files as users have them: answered, refused, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from service.batch import run_batch
from service.batch_file import BatchInput, BatchOutput
from service.errors import ExitCode, UsageError
from service.progress import Progress
from service.settings import ServeSettings
from tests.service.process import clean_environment


def line(custom_id: object, **changes: object) -> dict[str, object]:
    body = {"prompt": f"Tom and {custom_id} went", "max_tokens": 8, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | changes


def write(path: Path, *lines: Mapping[str, object] | str) -> Path:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))
    return path


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service", "batch", str(source), str(target), "--threads", "1"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment())


def run(source: Path, target: Path) -> tuple[int, str]:
    process = start(source, target)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def answers(path: Path) -> dict[str, dict[str, Any]]:
    """By custom id; each may be there once."""
    read = [json.loads(raw) for raw in path.read_text().splitlines()]
    found = {answer["custom_id"]: answer for answer in read}
    assert len(found) == len(read)
    return found


def texts(path: Path) -> dict[str, list[str]]:
    return {
        name: [choice["text"] for choice in answer["response"]["body"]["choices"]]
        for name, answer in answers(path).items()
        if answer["response"]["status_code"] == 200
    }


def test_a_line_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    twice = json.dumps(line("r1")).replace('"max_tokens": 8', '"max_tokens": 8, "max_tokens": 9')
    with pytest.raises(UsageError, match=r"line 2: 'body\.max_tokens' is there more than once"):
        BatchInput(write(tmp_path / "in.jsonl", line("r0"), twice))


def test_answers_every_request_and_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    many = line("many", body={"prompt": ["One", "Two"], "n": 2, "max_tokens": 4, "seed": 5, "logprobs": 1})
    wrong = line("wrong", body={"prompt": "x", "max_tokens": -1})
    source = write(tmp_path / "in.jsonl", *[line(f"r{i}") for i in range(60)], "", many, wrong)
    target = tmp_path / "out.jsonl"

    assert run(source, target)[0] == ExitCode.OK

    found = answers(target)
    assert found.keys() == {*(f"r{i}" for i in range(60)), "many", "wrong"}
    assert found["wrong"]["response"]["status_code"] == 400
    assert found["wrong"]["response"]["body"]["error"]["param"] == "max_tokens"
    good = found["many"]["response"]
    assert [choice["index"] for choice in good["body"]["choices"]] == [0, 1, 2, 3]
    assert len(good["body"]["choices"][0]["logprobs"]["tokens"]) == 4
    assert good["request_id"] == good["body"]["id"]
    assert all(answer["error"] is None and answer["id"].startswith("batch_req_") for answer in found.values())

    whole = texts(target)
    kept = target.read_bytes().splitlines(keepends=True)[:40]
    torn = b"".join(kept) + b'{"id":"batch_req_1","custom_id":"r1'
    target.write_bytes(torn)

    code, said = run(source, target)

    assert code == ExitCode.OK
    assert "40 of 62 requests are answered already" in said
    assert target.read_bytes().startswith(b"".join(kept))
    assert texts(target) == whole


def test_an_interrupted_run_loses_nothing(tmp_path: Path) -> None:
    long = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True}
    source = write(tmp_path / "in.jsonl", *[line(f"r{i}", body=long) for i in range(200)])
    target = tmp_path / "out.jsonl"
    process = start(source, target)
    deadline = time.monotonic() + 90
    while not (target.exists() and target.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)

    assert process.returncode == ExitCode.INTERRUPTED
    found = answers(target)
    assert 0 < len(found) < 200
    assert f"interrupted: {200 - len(found)} requests are left" in said


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: must be a JSON object"),
        (line("a"), "line 2: 'custom_id' is that of line 1"),
        (line(""), "line 2: 'custom_id'"),
        (line(7), "line 2: 'custom_id'"),
        (line("b", method="GET"), "line 2: 'method'"),
        (line("b", url="/v1/chat/completions"), "line 2: 'url'"),
        (line("b", body="text"), "line 2: 'body'"),
        (line("b", body={"stream": True}), "line 2: 'body.stream'"),
        (line("b", extra=1), "line 2: 'extra'"),
    ],
)
def test_a_file_with_a_wrong_line_is_refused_whole(tmp_path: Path, wrong: Any, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        BatchInput(write(tmp_path / "in.jsonl", line("a"), wrong))
    assert told in str(refused.value)


def test_tells_of_a_few_wrong_lines_and_counts_the_rest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 5: .*; and 4 more$"):
        BatchInput(write(tmp_path / "in.jsonl", *["nonsense"] * 9))


def test_wrong_files_are_told_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.batch.start_engine", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("service.batch.configure_logging", lambda *_: None)  # which is for a process of its own
    source = write(tmp_path / "in.jsonl", line("a"))
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("a line without an end")
    with BatchOutput(tmp_path / "other.jsonl") as other:
        other.write("z", 200, "cmpl-1", b"{}")
    os.link(source, tmp_path / "same.jsonl")
    before = source.read_bytes()

    def refuses(in_file: str, out_file: str, told: str) -> None:
        with pytest.raises(UsageError, match=re.escape(told)):
            run_batch(ServeSettings(), tmp_path / in_file, tmp_path / out_file, Progress(is_quiet=True))

    refuses("none.jsonl", "out.jsonl", "No such file")
    refuses("in.jsonl", "no/out.jsonl", "No such file")
    refuses("in.jsonl", "in.jsonl", "give another one for the answers")
    refuses("in.jsonl", "same.jsonl", "give another one for the answers")
    refuses("in.jsonl", "other.jsonl", "answers to other requests, such as 'z'")
    refuses("in.jsonl", "foreign.txt", "holds something else than a batch's answers")
    assert source.read_bytes() == before
    assert foreign.read_text() == "a line without an end"
