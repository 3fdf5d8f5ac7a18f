"""The engine over a network of the second version: whatever the schedule, each request gets its own one-pass text."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import save_model
from model.config import MosaicV2Config
from model.kernels.cpu_kernel import CpuKernel
from model.kernels.cpu_library import kernel_path
from model.kernels.kernel import TorchKernel
from model.mosaic_v2 import MemoryMosaicV2
from service.config import EngineConfig
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.loader import load_engine
from service.engine.local_client import LocalEngineClient
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.short_term import ShortTermBlocks
from tests.engine.served import engine_over, one_pass, run

MAX_MODEL_LEN = 64
CONFIG = MosaicV2Config(
    vocab_size=40, n_layer=2, n_head=2, n_embd=16, block_size=MAX_MODEL_LEN, persistent_size=24, short_window=13,
    long_delay=5, max_train_delay=13, eos_token_id=0, tokenizer_vocab_size=37,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MemoryMosaicV2:
    torch.manual_seed(5)
    # float64 leaves no room for a near tie to fall the other way.
    return MemoryMosaicV2(CONFIG).cast_weights(torch.float64).eval().requires_grad_(False)


def manage_blocks(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    *,
    spare_short_blocks: int = 0,
    has_prefix_cache: bool = True,
) -> BlockManager:
    window = CONFIG.short_window - 1
    needed = ShortTermBlocks.num_needed(window, block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    short_term = ShortTermBlocks(num_blocks, needed + spare_short_blocks, block_size, window)
    return BlockManager(num_blocks, block_size, max_num_seqs, has_prefix_cache=has_prefix_cache, short_term=short_term)


def make_engine(
    model: MemoryMosaicV2,
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    spare_short_blocks: int = 0,
) -> Engine:
    blocks = manage_blocks(num_blocks, block_size, max_num_seqs, budget, spare_short_blocks=spare_short_blocks)
    engine = engine_over(TorchKernel(model), CONFIG, blocks, budget, torch.float64, torch.float64)
    # What no sequence has written may not matter.
    engine.runner.cache.keys.fill_(7)  # type: ignore[attr-defined]
    engine.runner.cache.values.fill_(-1e3)  # type: ignore[attr-defined]
    engine.runner.cache.state.fill_(float("nan"))  # type: ignore[attr-defined]
    return engine


def make_request(name: str, length: int, max_tokens: int, seed: int, temperature: float = 0.8) -> Request:
    """Prompts of equal seeds begin alike."""
    rng = random.Random(seed)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
    return Request(name, tuple(rng.randrange(CONFIG.vocab_size) for _ in range(length)), sampling)


@settings(max_examples=25, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2), st.integers(0, 10)),
        min_size=1,
        max_size=5,
    ),
    block_size=st.sampled_from([1, 3, 8, 64]),
    spare_blocks=st.integers(0, 12),
    spare_short_blocks=st.integers(0, 20),
    max_num_seqs=st.integers(1, 4),
    extra_budget=st.integers(0, 40),
)
def test_batched_chunked_preempted_and_found_again_equals_one_pass(
    model: MemoryMosaicV2,
    specs: list[tuple[int, int, int, int]],
    block_size: int,
    spare_blocks: int,
    spare_short_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
) -> None:
    requests = [make_request(f"r{i}", length, tokens, seed) for i, (length, tokens, seed, _) in enumerate(specs)]
    engine = make_engine(
        model,
        num_blocks=-(-(MAX_MODEL_LEN - 1) // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + extra_budget,
        spare_short_blocks=spare_short_blocks,
    )
    produced = run(engine, requests, [spec[3] for spec in specs])
    assert produced == {request.request_id: one_pass(model, request) for request in requests}


def test_alone_batched_and_preempted_are_equal(model: MemoryMosaicV2) -> None:
    requests = [make_request(f"r{i}", 20 + i, 38, i) for i in range(4)]
    expected = {request.request_id: one_pass(model, request) for request in requests}
    for request in requests:
        alone = make_engine(model, num_blocks=8, block_size=8, max_num_seqs=1, budget=64)
        assert run(alone, [request], [0])[request.request_id] == expected[request.request_id]
    tight = make_engine(model, num_blocks=17, block_size=8, max_num_seqs=4, budget=16)
    assert run(tight, requests, [0] * 4) == expected
    assert tight.scheduler.num_preemptions > 0
    again = make_engine(model, num_blocks=40, block_size=8, max_num_seqs=4, budget=64, spare_short_blocks=30)
    assert run(again, requests, [0] * 4) == expected
    assert run(again, requests, [0] * 4) == expected
    assert again.scheduler.blocks.prefix_cache.num_hit_tokens == sum(19 + i for i in range(4))


def test_a_forked_text_goes_on_from_the_shared_window(model: MemoryMosaicV2) -> None:
    stem = make_request("stem", 41, 1, 3)
    forks = [
        Request(f"f{i}", (*stem.prompt_token_ids, 5 + i, 9), SamplingParams(max_tokens=15, seed=i, ignore_eos=True))
        for i in range(3)
    ]
    engine = make_engine(model, num_blocks=60, block_size=4, max_num_seqs=3, budget=64, spare_short_blocks=30)
    run(engine, [stem], [0])
    produced = run(engine, forks, [0, 0, 1])
    assert produced == {fork.request_id: one_pass(model, fork) for fork in forks}
    assert engine.scheduler.blocks.prefix_cache.num_hit_tokens == 3 * 41


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_cpu_kernels_no_byte_depends_on_the_schedule(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    kernel = CpuKernel(MemoryMosaicV2(CONFIG).cast_weights(dtype).eval().requires_grad_(False), num_threads=2)
    requests = [make_request(f"r{i}", 20 + i % 3, 40, i % 2, (0.7, 1.5)[i % 2]) for i in range(6)]
    requests = [replace(r, sampling=replace(r.sampling, num_logprobs=2)) for r in requests]

    def produce(chosen: list[Request], blocks: BlockManager, budget: int) -> dict[str, list[tuple[object, ...]]]:
        engine = engine_over(kernel, CONFIG, blocks, budget, torch.float16)
        for request in chosen:
            engine.add_request(request)
        told: dict[str, list[tuple[object, ...]]] = {request.request_id: [] for request in chosen}
        while engine.has_work:
            for output in engine.step():
                told[output.request_id] += zip(output.new_token_ids, output.logprobs, strict=True)
            engine.scheduler.check_integrity()
        return told

    alone: dict[str, list[tuple[object, ...]]] = {}
    for request in requests:
        alone |= produce([request], manage_blocks(4, 16, 1, 64, has_prefix_cache=False), 64)
    roomy, tight = manage_blocks(24, 16, 6, 64, spare_short_blocks=20), manage_blocks(6, 16, 4, 7)
    assert produce(requests, roomy, 64) == alone
    assert roomy.prefix_cache.num_hit_tokens > 0
    assert produce(requests, tight, 7) == alone, "in small chunks, with preemptions"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_loaded_from_its_directory_it_serves(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(5)
    save_model(MemoryMosaicV2(CONFIG), CONFIG, tmp_path)
    config = EngineConfig(
        str(tmp_path),
        dtype=dtype,
        num_threads=1,
        max_num_seqs=2,
        max_num_batched_tokens=8,  # type: ignore[arg-type]
    )
    engine = load_engine(config)
    assert (engine.info.dtype, engine.info.kernel_path) == (dtype, kernel_path())
    engine.start()
    client = LocalEngineClient(engine)

    async def ask(name: str) -> list[int]:
        request = Request(name, (1, 2, 3), SamplingParams(max_tokens=50, seed=1, ignore_eos=True))
        outputs = [output async for output in client.generate(request)]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        return [token for output in outputs for token in output.new_token_ids]

    alone = await ask("alone")
    assert len(alone) == 50
    assert await asyncio.gather(*(ask(f"r{i}") for i in range(4))) == [alone] * 4
    await client.close()


def test_memory_for_the_windows_is_planned(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_model(MemoryMosaicV2(CONFIG), CONFIG, tmp_path)
    with pytest.raises(MemoryError, match="one sequence of 64 tokens"):
        load_engine(EngineConfig(str(tmp_path), memory_bytes=20_000, max_num_seqs=4))
