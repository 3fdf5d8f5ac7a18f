"""What crosses from a replica to a gateway survives the way, whatever field is added to it, and costs little."""

from __future__ import annotations

import pickle

import pytest

from service.engine.errors import EngineOverloadedError
from service.engine.request import FinishReason, RequestOutput, RequestTiming, TokenLogprob
from service.wire import Verdict, merge, pack, unpack

PLAIN = RequestOutput("a", (1, 2))
# One value for each field: a field that is added has to be added here, and then to survive.
VALUES = {
    "request_id": "b",
    "new_token_ids": (7, 8, 9),
    "finish_reason": FinishReason.STOP,
    "stop_token_id": 3,
    "error": "it broke",
    "timing": RequestTiming(0.1, 0.2, 0.3),
    "logprobs": (TokenLogprob(1, -0.5, 1, ((1, -0.5), (2, -1.5))), TokenLogprob(2, -3.0, 9)),
    "prompt_logprobs": (TokenLogprob(4, -0.25, 1),),
    "num_cached_tokens": 64,
    "is_engine_failure": True,
    "num_resumptions": 2,
    "system_fingerprint": "0123-avx2-float32-float32",
}
LAST = ("finish_reason", "stop_token_id", "error", "timing", "is_engine_failure")
NAMES = RequestOutput._fields


def travelled(output: RequestOutput) -> RequestOutput:
    return unpack(pickle.loads(pickle.dumps(pack(output))))


@pytest.mark.parametrize("name", NAMES)
def test_every_field_survives_the_way(name: str) -> None:
    end = {"finish_reason": FinishReason.ERROR} if name in LAST else {}
    output = PLAIN._replace(**end | {name: VALUES[name]})
    assert travelled(output) == output


def test_all_fields_together_survive_the_way() -> None:
    output = RequestOutput(**{name: VALUES[name] for name in NAMES})  # type: ignore[arg-type]
    assert travelled(output) == output


@pytest.mark.parametrize("output", [PLAIN, PLAIN._replace(logprobs=VALUES["logprobs"])])
def test_tokens_and_their_scores_travel_as_builtins(output: RequestOutput) -> None:
    assert b"service" not in pickle.dumps(pack(output))


@pytest.mark.parametrize("name", NAMES)
def test_every_field_survives_merging(name: str) -> None:
    rest = RequestOutput("a")
    merged = merge(rest, rest._replace(**{name: VALUES[name]}))
    assert getattr(merged, name) == VALUES[name]
    if name not in (*LAST, "request_id"):
        assert merge(rest._replace(**{name: VALUES[name]}), rest) == merged


def test_merging_keeps_the_order() -> None:
    first, second = ((TokenLogprob(n, -1.0, 1),) for n in range(2))
    merged = merge(RequestOutput("a", (1,), logprobs=first), RequestOutput("a", (2,), logprobs=second))
    assert (merged.new_token_ids, merged.logprobs) == ((1, 2), first + second)


def test_a_refusal_keeps_what_a_client_needs_of_it() -> None:
    verdict = pickle.loads(pickle.dumps(Verdict("r", EngineOverloadedError("full", retry_after_s=7.5))))
    assert (str(verdict.refusal), verdict.refusal.retry_after_s) == ("full", 7.5)
