"""On the shipped model: no byte of an answer, log probabilities included, tells a cache hit from a miss.

Every request is answered once alone by an engine without a prefix cache; then all of them by engines with one.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from model.checkpoint import load_model
from model.config import MosaicConfig
from model.kernels.cpu_kernel import CpuKernel
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.request import Request, RequestOutput, SamplingParams, TokenLogprob
from service.settings import DEFAULT_MODEL
from tests.engine.served import engine_over

Answer = tuple[tuple[int, ...], tuple[TokenLogprob, ...], tuple[TokenLogprob, ...] | None]


def make_requests(vocab_size: int) -> list[Request]:
    """Prompts that begin alike for a while, some quite alike, one asked about, some sampled; of two tenants."""
    rng = random.Random(3)

    def text(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, vocab_size) for _ in range(length))

    stem, tail = text(100), text(40)
    prompts = [(*stem, *tail), (*stem, *tail), (*stem, *tail), (*stem, *text(30)), stem, stem[:65], stem[:64], text(3)]
    requests = []
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(
            max_tokens=40, temperature=(0.0, 1.0)[i % 2], seed=7, choice_index=i, ignore_eos=True, num_logprobs=2
        )
        if i == 2:
            sampling = replace(sampling, num_prompt_logprobs=1)
        requests.append(Request(f"r{i}", prompt, sampling, cache_salt="other" if i == 4 else ""))
    return requests


def answers(engine: Engine, requests: list[Request]) -> dict[str, Answer]:
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
    return {
        name: (
            tuple(token for output in told for token in output.new_token_ids),
            tuple(logprob for output in told for logprob in output.logprobs),
            told[0].prompt_logprobs,
        )
        for name, told in outputs.items()
    }


Served = tuple[CpuKernel, MosaicConfig]


@pytest.fixture(scope="module")
def served() -> Served:
    model = load_model(DEFAULT_MODEL, dtype=torch.bfloat16)
    assert isinstance(model.config, MosaicConfig)
    return CpuKernel(model, num_threads=1), model.config


@pytest.fixture(scope="module")
def alone(served: Served) -> dict[str, Answer]:
    kernel, config = served
    result: dict[str, Answer] = {}
    for request in make_requests(config.vocab_size):
        blocks = BlockManager(16, 32, 1, has_prefix_cache=False)
        result |= answers(engine_over(kernel, config, blocks, 512, torch.float16), [request])
    return result


def engine_with_cache(served: Served, *, num_blocks: int = 64, max_num_seqs: int = 8, budget: int = 512) -> Engine:
    kernel, config = served
    return engine_over(kernel, config, BlockManager(num_blocks, 32, max_num_seqs), budget, torch.float16)


def test_one_after_the_other_and_once_more(served: Served, alone: dict[str, Answer]) -> None:
    engine = engine_with_cache(served)
    requests = make_requests(served[1].vocab_size)
    for request in requests * 2:
        assert answers(engine, [request])[request.request_id] == alone[request.request_id]
    cache = engine.scheduler.blocks.prefix_cache
    # Second time round only the two that must begin anew (salted the first time, asked about) did not find all.
    assert cache.num_hit_tokens > 700
    assert cache.num_evictions == 0


def test_together_sharing_one_prefill(served: Served, alone: dict[str, Answer]) -> None:
    engine = engine_with_cache(served)
    requests = make_requests(served[1].vocab_size)
    assert answers(engine, requests) == alone
    assert engine.scheduler.blocks.prefix_cache.num_hit_tokens == 139 + 97 + 33 + 33


@pytest.mark.parametrize("budget", [8, 97])
def test_under_pressure_with_evictions_and_preemptions(served: Served, alone: dict[str, Answer], budget: int) -> None:
    engine = engine_with_cache(served, num_blocks=16, max_num_seqs=6, budget=budget)
    requests = make_requests(served[1].vocab_size)
    assert answers(engine, requests) == alone
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.blocks.prefix_cache.num_evictions > 0
    assert engine.scheduler.blocks.prefix_cache.num_hit_tokens > 0
    assert engine.scheduler.blocks.num_free_blocks == 16


def test_under_pressure_with_a_pool_to_swap_into(served: Served, alone: dict[str, Answer]) -> None:
    kernel, config = served
    blocks = BlockManager(16, 32, 6, num_swap_blocks=20)
    engine = engine_over(kernel, config, blocks, 97, torch.float16)
    requests = make_requests(config.vocab_size)
    for _ in range(2):
        assert answers(engine, requests) == alone
    assert engine.scheduler.num_preemptions > 0
    assert blocks.swap_pool.num_outs > 0
    assert blocks.swap_pool.num_ins > 0


def test_texts_that_part_within_a_block(served: Served) -> None:
    kernel, config = served
    engine, rng = engine_with_cache(served), random.Random(5)
    stem = [rng.randrange(1, config.vocab_size) for _ in range(90)]
    for i in range(3):
        plain = engine_over(kernel, config, BlockManager(16, 32, 1, has_prefix_cache=False), 512, torch.float16)
        prompt = (*stem, *(rng.randrange(1, config.vocab_size) for _ in range(20 + i)))
        request = Request(f"r{i}", prompt, SamplingParams(max_tokens=30, seed=i, ignore_eos=True, num_logprobs=2))
        assert answers(engine, [request]) == answers(plain, [request])
    assert engine.scheduler.blocks.prefix_cache.num_hit_tokens == 65 + 90


def test_a_conversation_of_many_turns(served: Served) -> None:
    kernel, config = served
    engine = engine_with_cache(served)
    plain = engine_over(kernel, config, BlockManager(16, 32, 1, has_prefix_cache=False), 512, torch.float16)
    text: tuple[int, ...] = tuple(range(100, 150))
    for turn in range(3):
        request = Request(f"t{turn}", text, SamplingParams(max_tokens=30, seed=turn, ignore_eos=True, num_logprobs=1))
        answer = answers(engine, [request])[request.request_id]
        assert answer == answers(plain, [request])[request.request_id]
        text += (*answer[0], 200 + turn, 300 + turn)
    # Every turn found all whole blocks of the ones before, which had absorbed 79 and 111 tokens.
    assert engine.scheduler.blocks.prefix_cache.num_hit_tokens == 65 + 97
