"""Real replicas, one of two or both, are killed while every kind of request is under way: no byte is different."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from starlette.types import ASGIApp

from service.gateway.call import post_json
from service.ray_cluster import RayCluster
from service.settings import ServeSettings
from service.startup import served_model
from tests.service.engines import engine_of
from tests.service.test_ray_faults import replica_pids

if TYPE_CHECKING:
    from service.ray_client import RayEngineClient

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

APP = "resume"
LONG = {"max_tokens": 400, "ignore_eos": True}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": LONG | {"temperature": 0},
    "sampled": LONG | {"temperature": 0.9, "top_p": 0.95, "return_token_ids": True},
    "streamed": LONG | {"stream": True, "stream_options": {"include_usage": True}},
    "several": LONG | {"n": 3, "max_tokens": 300},
    "penalties": LONG | {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "stopped": {"max_tokens": 450, "stop": ["zzzq", "lived happily"], "min_tokens": 300},
    "scored": LONG | {"logprobs": 2, "echo": True, "stream": True},
    "prompt-scored": LONG | {"prompt_logprobs": 1, "logprobs": 1},
    "grammar": {"max_tokens": 400, "structured_outputs": {"regex": r"([a-z]{2,8} ){70}end"}},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: RayCluster) -> AsyncIterator[RayEngineClient]:
    from ray import serve

    from service.deployment import engine_application
    from service.ray_client import RayEngineClient

    config = ServeSettings(threads=1).engine_config()
    await cluster.deploy(lambda: engine_application(config, num_replicas=2, num_cpus=0.1), APP)
    client = await RayEngineClient.connect(engine_of(APP))
    yield client
    await client.close()
    await asyncio.to_thread(serve.delete, APP)


async def ask(app: ASGIApp, kind: str, salt: str) -> dict[str, Any]:
    """The answer to one request, put together where it came in pieces."""
    body = KINDS[kind] | {"prompt": f"Once upon a time ({kind})", "seed": 7, "cache_salt": salt, "request_id": kind}
    answer = await post_json(app, "/v1/completions", json.dumps(body).encode())
    assert answer.status == 200, answer.body
    if not body.get("stream"):
        whole: dict[str, Any] = json.loads(answer.body)
        return whole | {"created": 0}
    lines = answer.body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line.startswith("data: ")]
    pieces = [choice for event in events for choice in event["choices"]]
    names = pieces[0]["logprobs"] or {}
    return {
        "heads": {(event["id"], event["system_fingerprint"], event["seed"]) for event in events},
        "text": "".join(piece["text"] for piece in pieces),
        "logprobs": {name: [x for piece in pieces for x in piece["logprobs"][name]] for name in names},
        "ends": [piece["finish_reason"] for piece in pieces if piece["finish_reason"]],
        "usage": [event["usage"] for event in events if event.get("usage")],
    }


async def ask_all(app: ASGIApp, salt: str) -> list[dict[str, Any]]:
    async with asyncio.timeout(300):
        return await asyncio.gather(*(ask(app, kind, salt) for kind in KINDS))


async def num_generated(client: RayEngineClient) -> int:
    return sum(stats.num_generated_tokens for stats in await client.stats())


@pytest.mark.parametrize("num_killed", [1, 2])
async def test_every_kind_of_request_survives_its_replica(
    client: RayEngineClient, caplog: pytest.LogCaptureFixture, num_killed: int
) -> None:
    from service.gateway.app import create_app

    async with asyncio.timeout(300):
        while len(await client.stats()) < 2:
            await asyncio.sleep(0.1)
    app = create_app(client, served_model(ServeSettings(), await client.info()))
    at_first = await num_generated(client)
    undisturbed = await ask_all(app, f"undisturbed {num_killed}")
    before = await num_generated(client)
    asking = asyncio.create_task(ask_all(app, f"killed {num_killed}"))
    async with asyncio.timeout(300):
        # A tenth of what there is to do: all are under way by then, and none has ended.
        while await num_generated(client) < before + 0.1 * (before - at_first):
            await asyncio.sleep(0.01)
    for pid in replica_pids(APP)[:num_killed]:
        os.kill(pid, signal.SIGKILL)
    killed = await asking
    for kind, then, now in zip(KINDS, undisturbed, killed, strict=True):
        assert now == then, kind
    metrics = app.state.gateway.metrics
    [family] = [f for f in metrics.families() if f.name == "mosaic_request_resumptions"]
    [sample] = family.samples
    num_choices = sum(kind.get("n", 1) for kind in KINDS.values())
    assert sample.value == num_choices if num_killed == 2 else 2 <= sample.value < num_choices
    assert caplog.text.count("goes on at") == sample.value
