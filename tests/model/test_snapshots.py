"""A copy of a sequence's pairs up to a token and a snapshot of its state there go on as the sequence itself did."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.cache import LOOK_AHEAD, MemoryBatch, MemoryCache
from model.config import MosaicConfig
from model.kernels.cpu_kernel import CpuKernel
from model.kernels.kernel import Kernel, TorchKernel
from model.mosaic_v1 import MemoryMosaic
from tests.model.test_cpu_kernel import BASE, PATHS, make_model

CONFIG = replace(BASE, n_head=3, n_embd=60, vocab_size=77, pmem_size=50, bias=True)
BLOCK_SIZE = 16


def make_cache(
    config: MosaicConfig, kernel: Kernel, dtype: torch.dtype, num_blocks: int, num_slots: int
) -> MemoryCache:
    cache = MemoryCache(
        config,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_slots=num_slots,
        memory_dtype=dtype,
        state_dtype=torch.float64 if dtype is torch.float64 else torch.float32,
        keys_by_dimension=kernel.keys_by_dimension,
    )
    for pool in (cache.keys, cache.values, cache.state):
        pool.fill_(3.0)
    return cache


def fork_everywhere(kernel: Kernel, config: MosaicConfig, dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The logits [sequence, time, vocab_size] of two sequences in random chunks, with a snapshot after every token; and
    for some of the snapshots those of a fork: of the tokens after it, by another sequence that begins there."""
    rng = random.Random(seed)
    time, each = 70, 5
    tokens = torch.randint(config.vocab_size, (2, time), generator=torch.Generator().manual_seed(seed))
    cache = make_cache(config, kernel, dtype, num_blocks=4 * each, num_slots=4 + 2 * time)
    tables = torch.randperm(cache.num_blocks)[: 2 * each].view(2, each)
    spare = [b for b in range(cache.num_blocks) if b not in tables][:each]
    parts: list[list[Tensor]] = [[], []]
    done = 0
    while done < time:
        new = min(rng.choice([1, 1, 5, 30]), time - done)
        kept = torch.stack([4 + s * time + torch.arange(done, done + new) for s in (0, 1)])
        batch = MemoryBatch(cache, torch.tensor([2, 0]), tables, (done,) * 2, (new,) * 2, kept.flatten())
        logits = kernel.step(tokens[:, done : done + new].flatten(), batch, rows=torch.arange(2 * new))
        for s in (0, 1):
            parts[s].append(logits[s * new : (s + 1) * new])
        done += new
    forks = []
    for at in (1, 2, 16, BLOCK_SIZE + LOOK_AHEAD, 2 * BLOCK_SIZE, 69):
        used = -(-(at - LOOK_AHEAD) // BLOCK_SIZE)
        cache.copy_blocks(tables[1, :used].tolist(), spare[:used])
        cache.copy_slots([4 + time + at - 1], [3])
        batch = MemoryBatch(cache, torch.tensor([3]), torch.tensor([spare]), (at,), (time - at,))
        forks.append(kernel.step(tokens[1, at:], batch, rows=torch.arange(time - at)))
    return torch.stack([torch.cat(rows) for rows in parts]), forks


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"has_persistent": False, "pmem_size": 0, "pmem_count": 0}])
def test_forks_have_the_bytes_of_the_whole(path: str, dtype: torch.dtype, changes: dict[str, object]) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    kernel = CpuKernel(make_model(config, dtype=dtype), num_threads=2, path=path)
    for seed in range(2):
        whole, forks = fork_everywhere(kernel, config, torch.float16, seed)
        for fork in forks:
            assert torch.equal(fork, whole[1, -len(fork) :])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), has_persistent=st.booleans())
def test_the_plain_forward_forks_too(seed: int, has_persistent: bool) -> None:
    sizes = {} if has_persistent else {"pmem_size": 0, "pmem_count": 0}
    config = replace(CONFIG, has_persistent=has_persistent, **sizes)  # type: ignore[arg-type]
    model: MemoryMosaic = copy.deepcopy(make_model(config, seed)).double()
    whole, forks = fork_everywhere(TorchKernel(model), config, torch.float64, seed)
    for fork in forks:
        torch.testing.assert_close(fork, whole[1, -len(fork) :], rtol=1e-9, atol=1e-9)


def test_copies_read_everything_before_they_write() -> None:
    cache = MemoryCache(CONFIG, num_blocks=3, block_size=BLOCK_SIZE, num_slots=3)
    cache.keys.copy_(torch.arange(3.0).view(1, 3, 1, 1, 1).expand_as(cache.keys))
    cache.state.copy_(torch.arange(3.0).view(1, 3, 1, 1).expand_as(cache.state))
    cache.copy_blocks([0, 1], [1, 2])
    cache.copy_slots([2, 0], [0, 1])
    assert cache.keys[0, :, 0, 0, 0].tolist() == [0, 0, 1]
    assert cache.state[0, :, 0, 0].tolist() == [2, 0, 2]


def test_a_snapshot_outside_of_memory_is_refused() -> None:
    kernel = CpuKernel(make_model(BASE), num_threads=1)
    cache = MemoryCache(BASE, num_blocks=2, block_size=16, num_slots=2, keys_by_dimension=True)
    slots, table = torch.tensor([0]), torch.tensor([[1]])
    for slot in (-2, 2):
        batch = MemoryBatch(cache, slots, table, (0,), (2,), torch.tensor([-1, slot]))
        with pytest.raises(RuntimeError, match="snapshot slot"):
            kernel.step(torch.tensor([1, 2]), batch)
    with pytest.raises(ValueError, match="snapshots"):
        MemoryBatch(cache, slots, table, (0,), (2,), torch.tensor([-1]))
