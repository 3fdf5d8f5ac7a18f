"""A short soak of the real server; and that a soak would tell of what is wrong."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from loadtests.cli import main
from loadtests.exposition import gauge_sum
from loadtests.mixture import MixedRequest, Outcome, fault, mixed_request
from loadtests.soak import MIB, Sample, SoakResult, report

# Memory that a few seconds fill: what is written to for the first time counts as growth.
SERVE = f"{sys.executable} -m service serve --local --threads 1 --memory 32MiB --port {{port}}"
REST = Sample(0.0, 100 * MIB, 0, 0, 0, 0)


def test_a_short_soak_finds_nothing_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--minutes", "0.15", "--concurrency", "12", "--max-growth-mib", "200", "--server-command", SERVE]
    code = main(["soak", "--out", str(tmp_path / "soak"), *options])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "Passed" in told
    saved = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert sum(saved["sent"].values()) > 50
    assert saved["problems"] == []
    assert any(sample["num_running"] for sample in saved["samples"])


def grown(mib_per_sample: float, rest: Sample | None = REST) -> SoakResult:
    result = SoakResult(60.0, 16 * MIB, rest=rest)
    result.samples = [Sample(float(i), int((100 + mib_per_sample * i) * MIB), 1, 0, 1, 1) for i in range(60)]
    return result


def test_growth_counts_after_the_warm_up_alone() -> None:
    assert grown(0).problems == []
    assert grown(1).growth_bytes == pytest.approx(39 * MIB)
    assert "memory grew by 39.0 MiB" in grown(1).problems[0]
    early = grown(0)
    early.samples[:20] = [Sample(float(i), i * MIB, 1, 0, 1, 1) for i in range(20)]
    assert early.problems == []


def test_what_is_held_at_rest_or_answered_wrongly_fails() -> None:
    assert "still held" in grown(0, rest=None).problems[0]
    leaking = grown(0, rest=Sample(0.0, MIB, 0, 0, 1, 0))
    assert "num_used_blocks=1" in leaking.problems[0]
    assert "FAILED" in report(leaking)
    wrong = grown(0)
    wrong.num_faults, wrong.faults = 1, ["stream: status 500"]
    assert "status 500" in wrong.problems[0]


def test_a_mixture_has_every_kind_and_is_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[MixedRequest]:
        rng = random.Random(seed)
        return [mixed_request(rng) for _ in range(300)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({request.kind for request in drawn(1)}) == 11


WHOLE = MixedRequest("whole", b"", Outcome.ANSWERED)
STREAM = MixedRequest("stream", b"", Outcome.ANSWERED, num_choices=2, is_stream=True)
ERROR = b'{"error": {"message": "no"}}'


def event(index: int, finish: str | None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": index, "finish_reason": finish}]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("request_", "status", "body", "is_right"),
    [
        (WHOLE, 200, b'{"choices": [{"index": 0, "finish_reason": "stop"}]}', True),
        (WHOLE, 200, b'{"choices": [{"index": 0, "finish_reason": null}]}', False),
        (WHOLE, 200, b'{"choices": []}', False),
        (WHOLE, 200, b"<html>", False),
        (WHOLE, 500, ERROR, False),
        (STREAM, 200, event(0, None) + event(1, "stop") + event(0, "length") + b"data: [DONE]\n\n", True),
        (STREAM, 200, event(1, "stop") + event(0, "length"), False),
        (STREAM, 200, event(1, "stop") + event(1, "stop") + event(0, "stop") + b"data: [DONE]\n\n", False),
        (STREAM, 200, event(1, "stop") + b"data: [DONE]\n\n", False),
        (MixedRequest("wrong", b"", Outcome.REFUSED), 400, ERROR, True),
        (MixedRequest("wrong", b"", Outcome.REFUSED), 200, b"{}", False),
    ],
)
def test_an_answer_is_right_only_if_each_choice_ends_once(
    request_: MixedRequest, status: int, body: bytes, is_right: bool
) -> None:
    assert (fault(request_, status, body) is None) is is_right


def test_reads_sums_out_of_metrics() -> None:
    text = '# HELP a b\na 1.5\na_total 4\nb{x="1",y="q"} 2\nb{x="1",y="r"} 3e1\nb{x="2",y="q"} 5\n'
    assert gauge_sum(text, "a") == 1.5
    assert gauge_sum(text, "b") == 37
    assert gauge_sum(text, "b", x="1") == 32
    with pytest.raises(KeyError):
        gauge_sum(text, "c")
