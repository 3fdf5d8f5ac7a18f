"""What crosses from a replica to a gateway survives the way, and costs little."""

from __future__ import annotations

import pickle

import pytest

from service.engine.errors import EngineOverloadedError
from service.engine.request import FinishReason, RequestOutput, RequestTiming
from service.wire import Verdict, merge, pack, unpack

OUTPUTS = [
    RequestOutput("a", (1, 2)),
    RequestOutput("a", (3,), FinishReason.STOP, stop_token_id=3, timing=RequestTiming(0.1, 0.2, 0.3)),
    RequestOutput("a", (), FinishReason.ERROR, error="it broke"),
    RequestOutput("a", (), FinishReason.ABORT, timing=RequestTiming(0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_comes_back_as_it_was(output: RequestOutput) -> None:
    assert unpack(pickle.loads(pickle.dumps(pack(output)))) == output


@pytest.mark.parametrize("output", OUTPUTS)
def test_nothing_but_builtins_is_packed(output: RequestOutput) -> None:
    assert b"service" not in pickle.dumps(pack(output))


def test_merging_keeps_the_order_of_ids_and_the_end() -> None:
    last = OUTPUTS[1]
    merged = merge(merge(None, OUTPUTS[0]), last)
    assert merged == RequestOutput("a", (1, 2, 3), FinishReason.STOP, 3, None, last.timing)


def test_a_refusal_keeps_what_a_client_needs_of_it() -> None:
    verdict = pickle.loads(pickle.dumps(Verdict("r", EngineOverloadedError("full", retry_after_s=7.5))))
    assert (str(verdict.refusal), verdict.refusal.retry_after_s) == ("full", 7.5)
