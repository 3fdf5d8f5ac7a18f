"""The C++ kernels against the plain forward, and against themselves: bytes must not depend on company or chunks."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.cache import MemoryBatch, MemoryCache
from model.config import MosaicConfig
from model.kernels import cpu_library
from model.kernels.choice import choose_path, is_fast_in_bfloat16
from model.kernels.cpu_kernel import CpuKernel
from model.kernels.cpu_library import kernel_path
from model.kernels.kernel import Kernel, TorchKernel
from model.mosaic_v1 import MemoryMosaic
from tests.model.mosaics import relative_error

PATHS = [path for path in ("avx512bf16", "avx2", "generic") if kernel_path(path)]
BASE = MosaicConfig(
    vocab_size=101,
    n_layer=2,
    n_head=4,
    n_embd=64,
    block_size=128,
    pmem_size=96,
    pmem_count=1,
    key_log_scale_max=5.0,
    persistent_key_log_scale_max=10.0,
    norm_eps=0.0,
    logit_scale=0.125,
    pre_norm=True,
    value_extractor="lowrlinearconv",
    bias=False,
    tied=True,
    has_persistent=True,
)
configs = st.builds(
    lambda heads, dim, **fields: replace(BASE, n_head=heads, n_embd=heads * dim, **fields),
    heads=st.integers(1, 4),
    dim=st.sampled_from([1, 5, 16, 21, 32, 40]),
    vocab_size=st.sampled_from([2, 63, 64, 65, 130]),
    pmem_size=st.sampled_from([1, 15, 64, 100]),
    pmem_count=st.integers(1, 2),
    norm_eps=st.sampled_from([0.0, 1e-10]),
    pre_norm=st.booleans(),
    value_extractor=st.sampled_from(["lowrlinearconv", "linearconv"]),
    bias=st.booleans(),
    tied=st.booleans(),
    has_persistent=st.booleans(),
)


@pytest.fixture(autouse=True, scope="module")
def is_built() -> None:
    assert PATHS, "the CPU kernels were not built: is a C++ compiler (g++) installed?"


def make_model(config: MosaicConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> MemoryMosaic:
    torch.manual_seed(seed)
    model = MemoryMosaic(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("log_scale"):
            torch.nn.init.uniform_(parameter, -0.05, 0.15)
        elif "norm.weight" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False).cast_weights(dtype)


class Run:
    """Feeds sequences to a kernel in any order and chunking, and keeps every token's logits."""

    def __init__(
        self,
        kernel: Kernel,
        config: MosaicConfig,
        tokens: Tensor,
        *,
        block_size: int = 16,
        memory_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.kernel, self.tokens, self.done = kernel, tokens, [0] * len(tokens)
        each = -(-tokens.shape[1] // block_size)
        spare = 3
        self.cache = MemoryCache(
            config,
            num_blocks=len(tokens) * each + spare,
            block_size=block_size,
            num_slots=len(tokens) + spare,
            memory_dtype=memory_dtype,
            keys_by_dimension=kernel.keys_by_dimension,
        )
        # What a block held before must not matter, as long as it is finite.
        for tensor in (self.cache.keys, self.cache.values, self.cache.state):
            tensor.fill_(3.0)
        shuffle = torch.Generator().manual_seed(seed)
        self.tables = torch.randperm(self.cache.num_blocks, generator=shuffle)[: len(tokens) * each].view(-1, each)
        self.slots = torch.randperm(self.cache.num_slots, generator=shuffle)[: len(tokens)]
        self.logits = torch.zeros(*tokens.shape, config.vocab_size)

    def feed(self, counts: dict[int, int]) -> None:
        rows = list(counts)
        batch = MemoryBatch(
            self.cache,
            self.slots[rows],
            self.tables[rows],
            tuple(self.done[r] for r in rows),
            tuple(counts.values()),
        )
        ids = torch.cat([self.tokens[r, self.done[r] : self.done[r] + n] for r, n in counts.items()])
        all_logits = self.kernel.step(ids, batch, rows=torch.arange(len(ids)))
        for r, part in zip(rows, all_logits.split(list(counts.values())), strict=True):
            self.logits[r, self.done[r] : self.done[r] + len(part)] = part
            self.done[r] += len(part)

    def in_one_go(self) -> Tensor:
        self.feed(dict.fromkeys(range(len(self.tokens)), self.tokens.shape[1]))
        return self.logits

    def at_random(self, seed: int) -> Tensor:
        rng = random.Random(seed)
        while min(self.done) < self.tokens.shape[1]:
            left = {r: self.tokens.shape[1] - d for r, d in enumerate(self.done) if d < self.tokens.shape[1]}
            chosen = [r for r in left if rng.random() < 0.7] or list(left)
            rng.shuffle(chosen)
            self.feed({r: min(left[r], rng.choice([1, 1, 2, 7, 13, 40])) for r in chosen})
        return self.logits


any_shape = given(
    config=configs, seed=st.integers(0, 2**20), block_size=st.sampled_from([16, 32, 48]), path=st.sampled_from(PATHS)
)


def drawn(config: MosaicConfig, seed: int) -> tuple[MosaicConfig, MemoryMosaic, Tensor]:
    """A network of that shape, sound where persistent memories are left out, and three rows of tokens for it."""
    if not config.has_persistent:
        config = replace(config, pmem_size=0, pmem_count=0)
    model = make_model(config, seed)
    return config, model, torch.randint(config.vocab_size, (3, 45))


@settings(max_examples=25, deadline=None)
@any_shape
def test_any_shape_equals_the_plain_forward(config: MosaicConfig, seed: int, block_size: int, path: str) -> None:
    config, model, tokens = drawn(config, seed)
    kernel = CpuKernel(model, num_threads=1, path=path)
    exact = copy.deepcopy(model).double()(tokens).float()
    plain_error = relative_error(model(tokens), exact)
    error = relative_error(Run(kernel, config, tokens, block_size=block_size, seed=seed).at_random(seed), exact)
    # Keys of one or few dimensions make sharp kernels, at which float32 itself errs: then so may the kernel.
    assert error < max(3e-5, 10 * plain_error)


@settings(max_examples=25, deadline=None)
@any_shape
def test_any_quantised_shape_equals_the_plain_form(config: MosaicConfig, seed: int, block_size: int, path: str) -> None:
    config, model, tokens = drawn(config, seed)
    kernel = CpuKernel(model, num_threads=1, path=f"{path}-int8")
    plain = TorchKernel(model, is_quantised=True)
    expected = Run(plain, config, tokens, block_size=block_size, seed=seed).in_one_go()
    actual = Run(kernel, config, tokens, block_size=block_size, seed=seed).at_random(seed)
    error = (actual - expected).abs() / expected.abs().max().clamp(min=1e-3)
    # A number that lies between two levels may be rounded to either, and what follows from it moves by a level: rarely.
    assert error.quantile(0.5) < 1e-3
    assert error.max() < 0.1


@pytest.mark.parametrize("path", [*PATHS, *(f"{path}-int8" for path in PATHS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bytes_depend_on_nothing_but_the_tokens(path: str, dtype: torch.dtype, memory_dtype: torch.dtype) -> None:
    config = replace(BASE, n_head=3, n_embd=60, vocab_size=77, pmem_size=300, bias=True)
    model = make_model(config, dtype=dtype)
    tokens = torch.randint(config.vocab_size, (4, 100))

    def run(num_threads: int, rows: slice = slice(None)) -> Run:
        kernel = CpuKernel(model, num_threads=num_threads, path=path)
        return Run(kernel, config, tokens[rows], memory_dtype=memory_dtype, seed=num_threads)

    together = run(1).in_one_go()
    assert torch.equal(run(2).in_one_go(), together)
    for seed in range(3):
        assert torch.equal(run(3).at_random(seed), together)
    for row in range(4):
        assert torch.equal(run(2, slice(row, row + 1)).at_random(row)[0], together[row])


@pytest.mark.parametrize("path", PATHS)
def test_narrow_types_stay_close(path: str) -> None:
    # Scales as at the start of training: sharper ones belong to trained weights, on which narrow types are measured.
    torch.manual_seed(1)
    model = MemoryMosaic(BASE).eval().requires_grad_(False)
    tokens = torch.randint(BASE.vocab_size, (3, 100))
    exact = model(tokens)
    for dtype, memory_dtype, bound in (
        (torch.float32, torch.float16, 2e-3),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.float16, 4e-2),
    ):
        kernel = CpuKernel(copy.deepcopy(model).cast_weights(dtype), num_threads=1, path=path)
        logits = Run(kernel, BASE, tokens, memory_dtype=memory_dtype).in_one_go()
        assert 0 < relative_error(logits, exact) < bound, (dtype, memory_dtype)


def test_a_library_from_other_sources_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not cpu_library.is_of_this_revision(object())
    monkeypatch.setattr(cpu_library, "REVISION", cpu_library.REVISION + 1)
    with caplog.at_level(logging.WARNING):
        assert cpu_library.library.__wrapped__() is None
    assert "built from other sources" in caplog.text


def test_logits_come_for_the_last_token_of_each_sequence() -> None:
    model = make_model(BASE)
    run = Run(CpuKernel(model, num_threads=1), BASE, torch.randint(101, (2, 9)))
    batch = MemoryBatch(run.cache, run.slots, run.tables, (0, 0), (9, 5))
    ids = torch.cat([run.tokens[0], run.tokens[1, :5]])
    last = run.kernel.step(ids, batch)
    assert torch.equal(last, run.kernel.step(ids, batch, rows=torch.tensor([8, 13])))


@pytest.mark.parametrize("make", [partial(CpuKernel, num_threads=1), TorchKernel])
def test_the_start_is_told_once_and_before_anything_is_absorbed(make: Callable[[MemoryMosaic], Kernel]) -> None:
    kernel = make(make_model(BASE))
    cache = MemoryCache(BASE, num_blocks=2, block_size=16, num_slots=1, keys_by_dimension=kernel.keys_by_dimension)
    batch = MemoryBatch(cache, torch.tensor([0]), torch.tensor([[1]]), (0,), (2,))
    states: list[bool] = []
    kernel.step(torch.tensor([1, 2]), batch, on_start=lambda: states.append(bool(cache.state.any())))
    assert states == [False]
    assert cache.state.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [0, 101]}, "token id"),
        ({"token_ids": [-1, 0]}, "token id"),
        ({"slots": [99]}, "slot"),
        ({"slots": [-1]}, "slot"),
        ({"block_tables": [[99]]}, "block"),
    ],
)
def test_what_lies_outside_of_memory_is_refused(change: dict[str, list[object]], words: str) -> None:
    kernel = CpuKernel(make_model(BASE), num_threads=1)
    cache = MemoryCache(BASE, num_blocks=2, block_size=16, num_slots=1, keys_by_dimension=True)
    values = {"token_ids": [1, 2], "slots": [0], "block_tables": [[1]]} | change
    ids, slots, tables = (torch.tensor(values[name]) for name in ("token_ids", "slots", "block_tables"))
    with pytest.raises(RuntimeError, match=words):
        kernel.step(ids, MemoryBatch(cache, slots, tables, (0,), (2,)))
    assert not cache.state.any()
    pair_major = MemoryCache(BASE, num_blocks=2, block_size=16, num_slots=1)
    with pytest.raises(ValueError, match="by dimension"):
        kernel.step(torch.tensor([1]), MemoryBatch(pair_major, torch.tensor([0]), torch.tensor([[0]]), (0,), (1,)))


def test_the_choice_falls_back_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    def choose(
        wanted: str = "auto", dtype: torch.dtype = torch.float32, block_size: int = 32, quantization: str = "none"
    ) -> str:
        return choose_path(BASE, wanted, device="cpu", dtype=dtype, block_size=block_size, quantization=quantization)

    assert choose() == PATHS[0]
    assert choose("generic") == "generic"
    assert choose("torch") == "torch-cpu"
    assert choose(quantization="int8") == f"{PATHS[0]}-int8"
    assert choose("torch", quantization="int8") == "torch-cpu-int8"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert choose(block_size=10) == "torch-cpu"
        assert choose(dtype=torch.float16) == "torch-cpu"
    assert ["block size of 10" in caplog.messages[0], "float16" in caplog.messages[1]] == [True, True]
    with pytest.raises(ValueError, match="block size of 10"):
        choose("generic", block_size=10)
    for wrong in ({"wanted": "fast"}, {"quantization": "int3"}):
        with pytest.raises(ValueError, match="expected one of"):
            choose(**wrong)


def test_bfloat16_is_for_paths_that_lose_no_time_by_it() -> None:
    fast = {path: is_fast_in_bfloat16("cpu", path) for path in ("torch", *PATHS)}
    assert fast == {"torch": False, **{path: path != "generic" for path in PATHS}}
    assert is_fast_in_bfloat16("cpu") is (PATHS[0] != "generic")
    assert is_fast_in_bfloat16("cuda")
