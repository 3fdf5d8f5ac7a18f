"""The engine over a real network: whatever the schedule, each request gets the tokens of its own one-pass reference."""

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
from model.config import MosaicConfig
from model.fingerprint import fingerprint
from model.kernels.cpu_kernel import CpuKernel
from model.kernels.cpu_library import REVISION, library
from model.kernels.kernel import TorchKernel
from model.mosaic_v1 import MemoryMosaic
from service.config import EngineConfig
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.loader import load_engine
from service.engine.local_client import LocalEngineClient
from service.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from tests.engine.served import engine_over, one_pass, run

MAX_MODEL_LEN = 64
CONFIG = MosaicConfig(
    vocab_size=40,
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=MAX_MODEL_LEN,
    pmem_size=12,
    pmem_count=1,
    key_log_scale_max=5.0,
    persistent_key_log_scale_max=10.0,
    norm_eps=0.0,
    logit_scale=1.0,
    pre_norm=True,
    value_extractor="lowrlinearconv",
    bias=False,
    tied=True,
    has_persistent=True,
    eos_token_id=0,
    tokenizer_vocab_size=37,
)


@pytest.fixture(scope="module")
def model() -> MemoryMosaic:
    torch.manual_seed(5)
    # float64 leaves no room for a near tie to fall the other way.
    return MemoryMosaic(CONFIG).cast_weights(torch.float64).eval().requires_grad_(False)


def make_engine(model: MemoryMosaic, *, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> Engine:
    blocks = BlockManager(num_blocks, block_size, max_num_seqs)
    return engine_over(TorchKernel(model), CONFIG, blocks, budget, torch.float64, torch.float64)


requests_strategy = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt tokens
        st.integers(1, 12),  # max_tokens
        st.sampled_from([0.0, 0.8, 1.5]),  # temperature
        st.integers(0, 10),  # step of arrival
        st.integers(0, 2**32),  # seed of prompt and sampling
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(
    specs=requests_strategy,
    block_size=st.sampled_from([1, 3, 8, 64]),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 4),
    extra_budget=st.integers(0, 40),
)
def test_batched_chunked_and_preempted_equals_one_pass(
    model: MemoryMosaic,
    specs: list[tuple[int, int, float, int, int]],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
) -> None:
    requests = []
    for i, (length, max_tokens, temperature, _, seed) in enumerate(specs):
        rng = random.Random(seed)
        prompt = tuple(rng.randrange(CONFIG.vocab_size) for _ in range(length))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, top_k=rng.choice([0, 5]))
        requests.append(Request(f"r{i}", prompt, sampling))
    engine = make_engine(
        model,
        num_blocks=-(-(MAX_MODEL_LEN - 1) // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + extra_budget,
    )
    produced = run(engine, requests, [spec[3] for spec in specs])
    assert produced == {request.request_id: one_pass(model, request) for request in requests}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_cpu_kernels_no_byte_depends_on_the_schedule(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    model = MemoryMosaic(CONFIG).cast_weights(dtype).eval().requires_grad_(False)
    kernel = CpuKernel(model, num_threads=2)
    rng = random.Random(0)
    requests = [
        Request(
            f"r{i}",
            tuple(rng.randrange(40) for _ in range(rng.randint(1, 30))),
            SamplingParams(max_tokens=30, seed=i, temperature=rng.choice([0.7, 1.5]), top_p=rng.choice([0.9, 1.0])),
        )
        for i in range(6)
    ]

    def produce(chosen: list[Request], *, num_blocks: int, max_num_seqs: int, budget: int) -> dict[str, list[int]]:
        engine = engine_over(kernel, CONFIG, BlockManager(num_blocks, 16, max_num_seqs), budget, torch.float16)
        return run(engine, chosen, list(range(len(chosen))))

    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= produce([request], num_blocks=4, max_num_seqs=1, budget=64)
    assert produce(requests, num_blocks=24, max_num_seqs=6, budget=64) == alone
    assert produce(requests, num_blocks=5, max_num_seqs=4, budget=7) == alone, "in small chunks, with preemptions"


def test_preemption_really_happens_and_changes_nothing(model: MemoryMosaic) -> None:
    requests = [
        Request(f"r{i}", (i + 1,) * 20, SamplingParams(max_tokens=40, seed=i, ignore_eos=True)) for i in range(4)
    ]
    engine = make_engine(model, num_blocks=17, block_size=8, max_num_seqs=4, budget=16)
    produced = run(engine, requests, [0] * 4)
    assert engine.scheduler.num_preemptions > 0
    assert produced == {request.request_id: one_pass(model, request) for request in requests}


def test_resumed_elsewhere_the_text_goes_on(model: MemoryMosaic) -> None:
    request = Request("a", (3, 1, 4), SamplingParams(max_tokens=20, seed=9, ignore_eos=True))
    whole = one_pass(model, request)
    for done in (1, 7, 19):
        resumed = Request("a", request.prompt_token_ids, request.sampling, tuple(whole[:done]))
        engine = make_engine(model, num_blocks=63, block_size=1, max_num_seqs=1, budget=5)
        assert run(engine, [resumed], [0])["a"] == whole[done:]


@pytest.mark.parametrize("budget", [64, 4])
@pytest.mark.parametrize("num_blocks", [63, 120])
def test_log_probabilities_are_those_of_one_pass(model: MemoryMosaic, budget: int, num_blocks: int) -> None:
    requests = [
        Request(
            f"r{i}",
            tuple((7 * i + 3 * j) % 40 for j in range(12 + i)),
            SamplingParams(max_tokens=25, seed=i, ignore_eos=True, num_logprobs=i, num_prompt_logprobs=2 - i),
        )
        for i in range(3)
    ]
    engine = make_engine(model, num_blocks=num_blocks, block_size=1, max_num_seqs=3, budget=budget)
    told: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            told[output.request_id].append(output)
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 63)
    for i, request in enumerate(requests):
        outputs, prompt = told[request.request_id], request.prompt_token_ids
        ids = [token for output in outputs for token in output.new_token_ids]
        logits = model(torch.tensor([[*prompt, *ids]]))[0]
        generated = [logprob for output in outputs for logprob in output.logprobs]
        assert [p.token_id for p in generated] == ids
        expected = logits[len(prompt) - 1 : -1, :37].log_softmax(-1)
        assert [p.logprob for p in generated] == pytest.approx(
            [float(e[t]) for e, t in zip(expected, ids, strict=True)]
        )
        assert all(len(p.top) == i for p in generated)
        assert all(p.top[0][1] == pytest.approx(float(e.max())) for p, e in zip(generated, expected, strict=True) if i)
        of_prompt = outputs[0].prompt_logprobs
        assert of_prompt is not None
        assert [p.token_id for p in of_prompt] == list(prompt[1:])
        expected = logits[: len(prompt) - 1].log_softmax(-1)
        wanted = [float(e[t]) for e, t in zip(expected, prompt[1:], strict=True)]
        assert [p.logprob for p in of_prompt] == pytest.approx(wanted)
        assert all(len(p.top) == 2 - i for p in of_prompt)
        assert all(output.prompt_logprobs is None for output in outputs[1:])


@pytest.mark.parametrize("budget", [64, 4])
def test_log_probabilities_come_from_the_cpu_kernels_too(budget: int) -> None:
    torch.manual_seed(5)
    plain = MemoryMosaic(CONFIG).eval().requires_grad_(False)
    engine = engine_over(CpuKernel(plain, num_threads=1), CONFIG, BlockManager(8, 16, 2), budget, torch.float32)
    asking = SamplingParams(max_tokens=3, ignore_eos=True, num_prompt_logprobs=1)
    requests = [Request("a", tuple(range(1, 12)), asking), Request("b", (5,) * 7, SamplingParams(max_tokens=3))]
    for request in requests:
        engine.add_request(request)
    outputs = [output for _ in range(12) for output in engine.step()]
    prompt = requests[0].prompt_token_ids
    [told] = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    expected = plain(torch.tensor([prompt]))[0].log_softmax(-1)
    assert [p.logprob for p in told] == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate(prompt[1:])], abs=1e-4
    )


def test_a_prompt_can_be_scored_without_generating(model: MemoryMosaic) -> None:
    request = Request("a", (1, 2, 3, 4), SamplingParams(max_tokens=0, num_prompt_logprobs=0))
    engine = make_engine(model, num_blocks=63, block_size=1, max_num_seqs=1, budget=2)
    engine.add_request(request)
    outputs = [output for _ in range(4) for output in engine.step()]
    assert [(o.new_token_ids, o.finish_reason) for o in outputs] == [((), FinishReason.LENGTH)]
    assert [p.token_id for p in outputs[0].prompt_logprobs or ()] == [2, 3, 4]
    engine.scheduler.check_integrity()
    assert not engine.has_work


def test_padding_ids_are_never_sampled(model: MemoryMosaic) -> None:
    sampling = SamplingParams(max_tokens=50, temperature=50.0, ignore_eos=True)
    engine = make_engine(model, num_blocks=63, block_size=1, max_num_seqs=1, budget=5)
    produced = run(engine, [Request("a", (1,), sampling)], [0])["a"]
    assert len(produced) == 50
    assert max(produced) < 37


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
async def test_loaded_from_its_directory_it_serves(tmp_path: Path, weights: str) -> None:
    torch.manual_seed(5)
    save_model(MemoryMosaic(CONFIG), CONFIG, tmp_path)
    how = {"quantization": "int8"} if weights == "int8" else {"dtype": weights}
    engine = load_engine(EngineConfig(str(tmp_path), max_num_seqs=2, max_num_batched_tokens=8, **how))  # type: ignore[arg-type]
    assert engine.info.max_model_len == MAX_MODEL_LEN
    assert engine.info.dtype == {"int8": "float32"}.get(weights, weights)
    assert engine.info.memory_dtype == {"float32": "float32"}.get(weights, "float16")
    assert engine.info.num_parameters == MemoryMosaic(CONFIG).num_parameters
    assert engine.info.kernel_path.endswith("-int8") == (weights == "int8")
    assert engine.info.fingerprint.endswith(engine.info.kernel_path)
    engine.start()
    client = LocalEngineClient(engine)

    async def ask(name: str) -> list[int]:
        request = Request(name, (1, 2, 3), SamplingParams(max_tokens=30, seed=1, ignore_eos=True))
        outputs = [output async for output in client.generate(request)]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        return [token for output in outputs for token in output.new_token_ids]

    alone = await ask("alone")
    assert len(alone) == 30
    if weights != "bfloat16":
        assert await asyncio.gather(*(ask(f"r{i}") for i in range(4))) == [alone] * 4
    await client.close()


def test_what_cannot_be_loaded_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_engine(EngineConfig(str(tmp_path / "nothing")))
    torch.manual_seed(5)
    save_model(MemoryMosaic(CONFIG), CONFIG, tmp_path)
    with pytest.raises(MemoryError, match="one sequence of 64 tokens"):
        load_engine(EngineConfig(str(tmp_path), memory_bytes=1024))


def test_a_checkpoint_other_than_the_one_asked_for_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(MemoryMosaic(CONFIG), CONFIG, tmp_path)
    known = fingerprint(tmp_path)
    config = EngineConfig(str(tmp_path), max_num_seqs=2, max_num_batched_tokens=8, fingerprint=known)
    info = load_engine(config).info
    assert known.startswith(info.fingerprint[:12])
    kernel = f"{info.kernel_path}.{REVISION}" if library() else info.kernel_path
    assert info.system_fingerprint == f"{known[:12]}-{kernel}-{info.dtype}-{info.memory_dtype}-s2"
    load_engine(replace(config, fingerprint=known[:12]))
    save_model(MemoryMosaic(CONFIG), CONFIG, tmp_path)
    with pytest.raises(ValueError, match=f"is {fingerprint(tmp_path)[:12]}, and {known[:12]} was asked"):
        load_engine(config)
