"""The memory cache: sizes as promised, batches that contradict themselves refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model.cache import MemoryBatch, MemoryCache, SimpleMemory, pooled_zeros
from tests.model.mosaics import random_model, small_config


def make_cache(**changes: Any) -> MemoryCache:
    sizes: dict[str, Any] = {"num_blocks": 5, "block_size": 4, "num_slots": 3}
    return MemoryCache(small_config(), **(sizes | changes))


def make_batch(**changes: Any) -> MemoryBatch:
    fields: dict[str, Any] = {
        "cache": make_cache(),
        "slots": torch.tensor([0, 1]),
        "block_tables": torch.zeros(2, 2, dtype=torch.int64),
        "num_computed": (0, 8),
        "num_new": (9, 1),
    }
    return MemoryBatch(**(fields | changes))


@pytest.mark.parametrize("memory_dtype", [torch.float64, torch.float32, torch.float16])
def test_tensors_and_their_bytes(memory_dtype: torch.dtype) -> None:
    config, cache = small_config(), make_cache(memory_dtype=memory_dtype, state_dtype=torch.float64)
    assert cache.keys.shape == cache.values.shape == (2, 5, 2, 4, 6)
    assert cache.state.shape == (2, 3, 3, 12)
    assert (cache.num_blocks, cache.num_slots, cache.device) == (5, 3, torch.device("cpu"))
    assert cache.keys.nbytes + cache.values.nbytes == 5 * MemoryCache.block_bytes(config, 4, memory_dtype)
    assert cache.state.nbytes == 3 * MemoryCache.slot_bytes(config, torch.float64)


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "num_slots"])
def test_a_cache_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make_cache(**{name: 0})


def test_sizes_of_a_batch() -> None:
    batch = make_batch()
    assert (batch.num_tokens, batch.max_pairs) == (10, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_new": (9,)}, "same sequences"),
        ({"slots": torch.tensor([0])}, "same sequences"),
        ({"block_tables": torch.zeros(2, dtype=torch.int64)}, "same sequences"),
        ({"num_new": (9, 0)}, "new token"),
        ({"num_computed": (0, -1)}, "new token"),
        ({"num_new": (10, 1)}, "no room for 9 pairs"),
        (
            {"slots": torch.zeros(0), "block_tables": torch.zeros(0, 2), "num_computed": (), "num_new": ()},
            "needs a sequence",
        ),
    ],
)
def test_batches_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_batch(**changes)


def test_simple_memory_counts_and_lets_sequences_sit_out() -> None:
    memory = SimpleMemory(small_config(), 3, 10, block_size=4)
    memory.extend([3, 0, 1])
    batch = memory.extend([0, 2, 1])
    assert memory.num_tokens == [3, 2, 2]
    assert batch.slots.tolist() == [1, 2]
    assert (batch.num_computed, batch.num_new) == ((0, 1), (2, 1))
    assert batch.block_tables.tolist() == [[3, 4, 5], [6, 7, 8]]


def test_pairs_and_state_lie_where_they_are_promised() -> None:
    # Two tokens, then a third: pair 0 and pair 1, unit vectors all, in blocks 4 and 2 of size 1.
    model = random_model(small_config()).requires_grad_(False)
    cache = make_cache(block_size=1, memory_dtype=torch.float64, state_dtype=torch.float64)
    for new, computed, table in ((2, 0, [[4]]), (1, 2, [[4, 2]])):
        token_ids = torch.arange(computed, computed + new)
        batch = MemoryBatch(cache, torch.tensor([1]), torch.tensor(table), (computed,), (new,))
        model(token_ids, batch)
    for pool in (cache.keys, cache.values):
        norms = pool.norm(dim=-1)
        torch.testing.assert_close(norms[:, [4, 2]], torch.ones(2, 2, 2, 1, dtype=torch.float64))
        assert not norms[:, [0, 1, 3]].any()
    assert cache.state[:, 1].abs().amin(dim=(0, 2)).gt(0).all()
    assert not cache.state[:, [0, 2]].any()


def test_a_failed_call_leaves_the_sequences_as_they_were() -> None:
    model = random_model(small_config()).requires_grad_(False)
    memory = SimpleMemory(model.config, 1, 9, memory_dtype=torch.float64, state_dtype=torch.float64)
    model(torch.tensor([1, 2]), memory.extend([2]))
    batch, state = memory.extend([1]), memory.cache.state.clone()
    with pytest.raises(IndexError):
        model(torch.tensor([99]), batch)
    assert torch.equal(memory.cache.state, state)
    torch.testing.assert_close(model(torch.tensor([3]), batch)[0], model(torch.tensor([[1, 2, 3]]))[0, -1])


def test_keys_stored_by_dimension_are_not_misread() -> None:
    memory = SimpleMemory(small_config(), 1, 9, keys_by_dimension=True)
    with pytest.raises(ValueError, match="by dimension"):
        random_model(small_config(), dtype=torch.float32)(torch.tensor([1, 2]), memory.extend([2]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells by Linux's /proc what memory is there")
def test_all_memory_is_taken_before_it_is_needed() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, size = resident_bytes(), 64 << 20
    pool = pooled_zeros((size,), torch.uint8, "cpu")
    assert resident_bytes() - before >= size
    assert not pool.any()
