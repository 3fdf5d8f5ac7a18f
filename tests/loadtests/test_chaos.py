"""A short form of the fault suite on the real server; and that it would tell of an answer that is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.chaos.crowd import Tally
from loadtests.chaos.question import Question, question_of, questions
from loadtests.chaos.reading import Outcome, outcome, read
from loadtests.chaos.suite import CaseResult, report
from loadtests.cli import main

STREAM = Question("stream", b"", is_stream=True)
WHOLE = Question("whole", b"", is_stream=False)


def test_no_client_loses_anything_when_a_replica_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["chaos", "--out", str(tmp_path / "chaos"), "--case", "kill-replica"])
    told = capsys.readouterr().out
    assert code == 0, told
    [killed] = json.loads((tmp_path / "chaos" / "chaos.json").read_text())["cases"]
    assert killed["finished"] == killed["accepted"] > 20, killed
    assert killed["resumed"] >= 1, killed


def event(text: str, index: int = 0, end: str | None = None) -> bytes:
    choice = {"index": index, "text": text, "finish_reason": end, "logprobs": None}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


ERROR = b'data: {"error": {"message": "it broke"}}\n\n'
DONE = b"data: [DONE]\n\n"
GOOD = event("a") + event("b") + event("", end="length") + DONE


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (GOOD, Outcome.FINISHED),
        (event("ab") + event("", end="length") + DONE, Outcome.FINISHED),
        (event("a") + ERROR, Outcome.FAILED),
        (ERROR, Outcome.FAILED),
        (event("x") + ERROR, Outcome.LOST),
        (event("a") + ERROR + ERROR, Outcome.LOST),
        (event("a") + ERROR + DONE, Outcome.LOST),
        (event("a") + event("b"), Outcome.LOST),
        (event("a") + event("c") + event("", end="length") + DONE, Outcome.LOST),
        (event("a") + event("b", end="length") + event("", end="length") + DONE, Outcome.LOST),
        (event("a") + DONE, Outcome.LOST),
        (b"data: {", Outcome.LOST),
    ],
)
def test_a_stream_has_one_end_and_the_right_bytes_or_is_lost(body: bytes, expected: Outcome) -> None:
    assert outcome(STREAM, read(STREAM, GOOD), 200, body)[0] is expected


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (503, "overloaded", Outcome.REFUSED),
        (503, "engine_dead", Outcome.FAILED),
        (500, "fatal_request", Outcome.FAILED),
    ],
)
def test_an_error_is_a_refusal_only_for_want_of_room(status: int, code: str, expected: Outcome) -> None:
    body = json.dumps({"error": {"message": "no", "type": "server_error", "param": None, "code": code}}).encode()
    assert outcome(WHOLE, read(STREAM, GOOD), status, body)[0] is expected
    assert outcome(WHOLE, read(STREAM, GOOD), status, b"Internal Server Error")[0] is Outcome.LOST


def test_questions_are_the_same_for_the_same_seed_and_say_how_they_are_answered() -> None:
    assert questions(1, 20) == questions(1, 20) != questions(2, 20)
    for question in questions(1, 20):
        assert "seed" in json.loads(question.body)
        assert question == question_of(question.kind, json.loads(question.body))


def test_what_is_lost_held_or_never_whole_fails() -> None:
    fine = CaseResult("kill-replica", Tally(), recovered_s=1.0)
    assert fine.is_passed
    assert "FAILED" not in report([fine])
    lost = Tally()
    lost.add("stream", Outcome.LOST, "no end")
    for bad in (
        CaseResult("kill-replica", lost, recovered_s=1.0),
        CaseResult("kill-replica", Tally(), recovered_s=1.0, held="1 running"),
        CaseResult("kill-replica", Tally(), problem="not whole again"),
    ):
        assert not bad.is_passed
        assert "FAILED: kill-replica" in report([bad])
