"""Traces of a real server, and of an engine replica on Ray, as a collector receives them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from service.config import EngineConfig
from service.ray_cluster import RayCluster
from tests.engine.scripted import make_request
from tests.gateway.server import wait_until
from tests.service.collector import Collector
from tests.service.engines import engine_of, load_paced
from tests.service.process import ServerProcess

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def client(collector: Collector) -> Iterator[httpx.Client]:
    with (
        ServerProcess("--local", "--threads", "1", "--trace-endpoint", collector.url) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def test_a_completion_is_a_trace_from_its_caller_to_the_phases_in_the_engine(
    client: httpx.Client, collector: Collector
) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 8, "n": 2, "ignore_eos": True, "seed": 5}
    answer = client.post("/v1/completions", json=body, headers={"traceparent": PARENT}).json()
    name = f"text_completion {answer['model']}"
    wait_until(lambda: collector.named(name) and len(collector.named("decode")) == 2, "the spans")
    [gateway] = collector.named(name)
    assert (gateway.service, gateway.trace_id, gateway.parent_id) == ("tessera-gateway", TRACE, CALLER)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": answer["model"],
        "gen_ai.response.id": answer["id"],
        "gen_ai.request.seed": 5,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 16,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "http.response.status_code": 200,
    }
    assert {key: gateway.attributes.get(key) for key in expected} == expected
    engines = collector.named("engine")
    assert [(span.service, span.trace_id, span.parent_id) for span in engines] == [
        ("tessera-engine", TRACE, gateway.span_id)
    ] * 2
    for engine in engines:
        assert gateway.start_ns <= engine.start_ns
        phases = [span for span in collector.spans if span.parent_id == engine.span_id]
        assert [span.name for span in sorted(phases, key=lambda span: (span.start_ns, span.end_ns))] == [
            *("queue", "prefill", "decode")
        ]
        assert sum(span.end_ns - span.start_ns for span in phases) == engine.end_ns - engine.start_ns


def test_refusals_and_the_unsampled(client: httpx.Client, collector: Collector) -> None:
    collector.spans.clear()
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"traceparent": PARENT[:-1] + "0"})
    client.get("/v1/models")
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
    wait_until(lambda: collector.spans, "the refusal")
    [span] = collector.spans
    assert (span.name, span.parent_id, span.attributes["http.response.status_code"]) == ("text_completion", "", 400)


def test_without_an_endpoint_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys, service.launcher, service.gateway.app, service.engine.loader;"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'service.tracing', 'service.gateway_tracing');"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.asyncio(loop_scope="session")
async def test_the_context_crosses_ray(cluster: RayCluster, collector: Collector) -> None:
    from ray import serve

    from service.deployment import engine_application
    from service.ray_client import RayEngineClient

    config = EngineConfig(model_dir="", block_size=16, max_num_seqs=4, trace_endpoint=collector.url)
    await cluster.deploy(lambda: engine_application(config, num_cpus=0.1, load=load_paced), "traced")
    client = await RayEngineClient.connect(engine_of("traced"))
    try:
        collector.spans.clear()
        request = make_request("r", max_tokens=5, ignore_eos=True)
        outputs = [output async for output in client.generate(replace(request, trace_context=PARENT))]
        assert outputs[-1].is_finished
        await asyncio.to_thread(wait_until, lambda: len(collector.spans) == 4, "the spans of the replica")
    finally:
        await client.close()
        await asyncio.to_thread(serve.delete, "traced")
    [engine] = collector.named("engine")
    assert (engine.trace_id, engine.parent_id) == (TRACE, CALLER)
    assert {span.name for span in collector.spans if span.parent_id == engine.span_id} == {"queue", "prefill", "decode"}
