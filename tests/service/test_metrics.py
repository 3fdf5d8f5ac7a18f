"""Metrics of a real engine behind a real gateway, against what the client and a scripted network counted themselves."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.engine_server import CountingRunner, serving
from tests.gateway.server import wait_until

PHASES = ("gateway", "queue", "prefill", "decode", "stream")


def scrape(client: httpx.Client) -> dict[str, float]:
    """The sum of each metric over all labels; of histograms, `_count` and `_sum`."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("mosaic_")
            if not name.endswith("_bucket"):
                values[name] = values.get(name, 0.0) + sample.value
    return values


def num_in_the_engine(client: httpx.Client) -> float:
    found = scrape(client)
    return found["num_requests_running"] + found["num_requests_waiting"]


class Reader:
    """Streams one completion in a thread and counts its tokens as they come."""

    def __init__(self, client: httpx.Client, max_tokens: int) -> None:
        self.num_tokens = 0
        self._client = client
        self._body = {"prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._client.stream("POST", "/v1/completions", json=self._body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.num_tokens += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])

    def join(self) -> None:
        self._thread.join(timeout=60)


def test_in_the_middle_of_a_run_a_scrape_is_what_the_client_has_counted() -> None:
    runner = CountingRunner(halts=(0, 6))
    with serving(runner, max_num_seqs=2) as client:
        readers = [Reader(client, 10) for _ in range(3)]
        wait_until(lambda: num_in_the_engine(client) == 3, "all three requests")
        runner.go_on()
        wait_until(lambda: runner.is_halted_at(6), "the engine to halt")
        wait_until(lambda: sum(r.num_tokens for r in readers) == runner.num_sampled, "the tokens of all steps")
        found = scrape(client)
        assert found["generation_tokens_total"] == sum(reader.num_tokens for reader in readers)
        assert found["engine_generation_tokens_total"] == runner.num_sampled
        assert found["num_requests_running"] == 2
        assert found["num_requests_waiting"] == found["queue_depth"] == 1
        assert found["time_to_first_token_seconds_count"] == 2
        assert found["prompt_tokens_total"] == 6, "of those that the engine has begun with"
        assert found["engine_prompt_tokens_total"] == 6
        assert found["engine_steps_total"] == found["engine_batch_size_count"] == runner.num_steps
        assert found["engine_step_tokens_sum"] == runner.num_absorbed
        assert found["request_success_total"] == 0
        runner.go_on()
        for reader in readers:
            reader.join()
        found = scrape(client)
        assert sum(reader.num_tokens for reader in readers) == 30
        assert found["generation_tokens_total"] == found["request_generation_tokens_sum"] == 30
        assert found["engine_generation_tokens_total"] == runner.num_sampled == 30
        assert found["engine_step_tokens_sum"] == runner.num_absorbed
        assert found["request_success_total"] == found["e2e_request_latency_seconds_count"] == 3
        assert found["num_requests_running"] == found["num_completions_in_flight"] == 0


def test_phases_are_where_the_time_went_and_add_up() -> None:
    step_s = 0.02
    runner = CountingRunner(lambda: time.sleep(step_s), halts=(0,))
    with serving(runner, max_num_seqs=1) as client, ThreadPoolExecutor(2) as pool:
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}

        def timed(_: int) -> float:
            started_s = time.perf_counter()
            client.post("/v1/completions", json=body)
            return time.perf_counter() - started_s

        timings = pool.map(timed, range(2))
        wait_until(lambda: num_in_the_engine(client) == 2, "both requests")
        runner.go_on()
        took_s = sum(timings)
        found = scrape(client)
    spent_s = {phase: found[f"request_{phase}_time_seconds_sum"] for phase in PHASES}
    assert {found[f"request_{phase}_time_seconds_count"] for phase in PHASES} == {2}
    assert sum(spent_s.values()) == pytest.approx(found["e2e_request_latency_seconds_sum"])
    # The client may have read the answer a little before the server knows that it has been sent.
    assert found["e2e_request_latency_seconds_sum"] <= 2 * took_s
    # Sleeping takes at least as long as told: one step to the first token, four to the last, while the other waits.
    assert spent_s["prefill"] >= 2 * step_s
    assert spent_s["decode"] >= 2 * 4 * step_s
    assert spent_s["queue"] >= 4 * step_s
    assert found["engine_step_duration_seconds_sum"] >= 10 * step_s
    assert found["engine_step_duration_seconds_count"] == 10
    assert spent_s["gateway"] > 0
    assert spent_s["stream"] > 0


def test_a_choice_that_we_end_ourselves_is_timed_too() -> None:
    """Where a client goes away, the engine's last word comes too late: what is known by then has to add up."""
    step_s = 0.02
    with serving(CountingRunner(lambda: time.sleep(step_s))) as client:
        body = {"prompt": [1, 2, 3], "max_tokens": 50, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(6):
                next(lines)
        wait_until(lambda: scrape(client)["e2e_request_latency_seconds_count"] == 1, "the count")
        found = scrape(client)
    spent_s = {phase: found[f"request_{phase}_time_seconds_sum"] for phase in PHASES}
    assert sum(spent_s.values()) == pytest.approx(found["e2e_request_latency_seconds_sum"])
    assert spent_s["prefill"] >= step_s
    assert spent_s["decode"] >= step_s


def test_what_the_prefix_cache_spares_is_counted() -> None:
    runner = CountingRunner()
    with serving(runner, has_prefix_cache=True) as client:
        for _ in range(2):
            client.post("/v1/completions", json={"prompt": list(range(1, 12)), "max_tokens": 2, "ignore_eos": True})
        found = scrape(client)
    assert found["prefix_cache_queries_total"] == 22
    assert found["prefix_cache_hits_total"] == 10
    assert found["prefix_cache_evictions_total"] == 0
    assert found["engine_prompt_tokens_total"] == 12
    assert (found["prefix_cache_blocks"], found["prefix_cache_snapshots"]) == (2, 3)
    assert found["memory_blocks"] == 64


def test_preemptions_and_resumptions_are_counted() -> None:
    # Room for one sequence of 64 tokens and a little more: two that grow have to take turns.
    runner = CountingRunner(halts=(0,))
    with serving(runner, num_blocks=17) as client:
        readers = [Reader(client, 50) for _ in range(2)]
        wait_until(lambda: num_in_the_engine(client) == 2, "both requests")
        runner.go_on()
        for reader in readers:
            reader.join()
        found = scrape(client)
    assert found["num_preemptions_total"] > 0
    assert found["num_resumptions_total"] == found["num_preemptions_total"]
    assert found["engine_prompt_tokens_total"] == 3 * (2 + found["num_resumptions_total"]), (
        "absorbed once more each time"
    )
    assert found["engine_generation_tokens_total"] == 100
