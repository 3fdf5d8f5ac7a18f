from __future__ import annotations

from dataclasses import replace

import pytest

from service.gateway.errors import BadRequestError
from service.gateway.plan import make_plan
from service.gateway.schema import CompletionRequest
from service.gateway.served_model import ServedModel
from service.gateway.settings import GatewaySettings
from tests.gateway.fake_engine import INFO

SERVED = ServedModel(("m",), None, replace(INFO, max_num_requests=18), created=0)


async def test_more_choices_than_the_engine_holds_are_refused_for_good() -> None:
    plan = await make_plan(CompletionRequest(prompt=[1], n=18), SERVED, GatewaySettings(), "id", 0.0)
    assert len(plan.requests) == 18
    for params, param in (
        (CompletionRequest(prompt=[1], n=19), "n"),
        (CompletionRequest(prompt=[[1]] * 19), "prompt"),
    ):
        with pytest.raises(BadRequestError, match="at most 18") as caught:
            await make_plan(params, SERVED, GatewaySettings(), "id", 0.0)
        assert caught.value.param == param
