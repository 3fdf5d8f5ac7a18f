"""The C++ kernels of the second version against the plain forward, and against themselves in other company."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.cache import LOOK_AHEAD, MemoryBatch, MemoryCache
from model.config import MosaicV2Config
from model.kernels.choice import choose_path
from model.kernels.cpu_kernel import CpuKernel
from model.kernels.cpu_library import kernel_path
from model.kernels.kernel import TorchKernel
from tests.model.mosaics import (
    assert_close,
    draw_ids,
    random_v2_model,
    relative_error,
    served,
    small_v2_config,
    v2_configs,
)

PATHS = [path for path in ("avx512bf16", "avx2", "generic") if kernel_path(path)]
CONFIG = small_v2_config(
    vocab_size=101, n_embd=64, n_head=4, persistent_size=90, short_window=40, long_delay=11, max_train_delay=40
)


@settings(max_examples=15, deadline=None)
@given(v2_configs(), st.integers(0, 1000), st.sampled_from(PATHS), st.sampled_from([1, 300]))
def test_equals_the_network(config: MosaicV2Config, seed: int, path: str, wildness: int) -> None:
    model = random_v2_model(config, seed, torch.float32).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "key.gate" in name:
            parameter.mul_(wildness)
    sequences = draw_ids(config.vocab_size, 50, 3, 17, seed=seed)
    kernel = CpuKernel(model, num_threads=1, path=path)
    precise = copy.deepcopy(model).double()
    logits = served(model, sequences, seed, block_size=16, kernel=kernel)
    for sequence, rows in zip(sequences, logits, strict=True):
        expected = precise(sequence[None])[0]
        # Numbers that all but cancel before a norm are as wrong after it as float32 left them: so may the kernel be.
        plain_error = relative_error(model(sequence[None])[0], expected)
        assert relative_error(rows, expected) <= max(1e-4, 10 * plain_error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_depend_on_nothing_but_the_text(path: str, dtype: torch.dtype) -> None:
    model = random_v2_model(CONFIG, dtype=dtype).requires_grad_(False)
    kernel = CpuKernel(model, num_threads=2, path=path)
    sequences = draw_ids(CONFIG.vocab_size, 150, 97, 30, 1, 64)

    def answers(seed: int, *chunks: int) -> list[Tensor]:
        return served(
            model, sequences, seed, block_size=16, max_chunk=max(chunks), chunk=lambda rng: rng.choice(chunks),
            kernel=kernel, memory_dtype=torch.float16,
        )  # fmt: skip

    alone = answers(0, 1)
    for seed, chunks in enumerate([(150,), (1, 1, 2, 7, 40), (3, 64, 5)], start=1):
        for a, b in zip(alone, answers(seed, *chunks), strict=True):
            assert torch.equal(a, b)
    for sequence, rows in zip(sequences, alone, strict=True):
        assert_close(rows, model(sequence[None])[0], 0.02 if dtype is torch.float32 else 0.2)


@pytest.mark.parametrize("path", PATHS)
def test_quantised_it_agrees_with_the_plain_form_of_that(path: str) -> None:
    model = random_v2_model(CONFIG, dtype=torch.float32).requires_grad_(False)
    kernel = CpuKernel(model, num_threads=1, path=f"{path}-int8")
    plain = TorchKernel(copy.deepcopy(model), is_quantised=True)
    sequences = draw_ids(CONFIG.vocab_size, 80, 33)
    expected = served(model, sequences, 0, block_size=16, kernel=plain)
    alone = served(model, sequences, 0, block_size=16, kernel=kernel)
    chunks = served(model, sequences, 1, block_size=16, max_chunk=80, chunk=lambda _: 80, kernel=kernel)
    for a, b, e in zip(alone, chunks, expected, strict=True):
        assert torch.equal(a, b)
        # An input a hair's breadth from the middle between two levels may go either way, and then a little more does.
        assert float((a - e).abs().mean() / e.abs().mean()) < 0.03


@pytest.mark.parametrize("path", PATHS)
def test_a_fork_from_a_snapshot_has_the_bytes_of_the_whole(path: str) -> None:
    model = random_v2_model(CONFIG, dtype=torch.float32).requires_grad_(False)
    kernel = CpuKernel(model, num_threads=2, path=path)
    time, each = 90, 6
    tokens = draw_ids(CONFIG.vocab_size, time)[0]
    cache = MemoryCache(CONFIG, num_blocks=4 * each, block_size=16, num_slots=time + 2, keys_by_dimension=True)
    tables = torch.arange(4 * each).view(4, 1, each)

    def step(ids: Tensor, slot: int, table: int, computed: int, snapshots: Tensor | None) -> Tensor:
        batch = MemoryBatch(
            cache, torch.tensor([slot]), tables[table], (computed,), (len(ids),), snapshots, tables[table + 1]
        )
        return kernel.step(ids, batch, rows=torch.arange(len(ids)))

    whole = step(tokens, 0, 0, 0, 2 + torch.arange(time))
    for at in (1, 2, 16 + LOOK_AHEAD, 50, 89):
        used = -(-(at - LOOK_AHEAD) // 16)
        for table in (0, 1):
            cache.copy_blocks(tables[table, 0, :used].tolist(), tables[table + 2, 0, :used].tolist())
        cache.copy_slots([2 + at - 1], [1])
        assert torch.equal(step(tokens[at:], 1, 2, at, None), whole[at:])


def test_what_does_not_fit_is_refused() -> None:
    model = random_v2_model(CONFIG, dtype=torch.float32).requires_grad_(False)
    kernel = CpuKernel(model, num_threads=1)
    cache = MemoryCache(CONFIG, num_blocks=2, block_size=16, num_slots=1, keys_by_dimension=True)
    slot, table = torch.tensor([0]), torch.tensor([[0]])
    with pytest.raises(RuntimeError, match="short-term tables"):
        kernel.step(torch.tensor([1, 2]), MemoryBatch(cache, slot, table, (0,), (2,)))
    with pytest.raises(RuntimeError, match="block out of range"):
        kernel.step(torch.tensor([1, 2]), MemoryBatch(cache, slot, table, (0,), (2,), short_tables=torch.tensor([[2]])))


def test_it_is_the_kernel_that_is_chosen() -> None:
    assert choose_path(CONFIG, device="cpu", dtype=torch.float32, block_size=32) == PATHS[0]
