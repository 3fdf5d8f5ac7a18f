"""Small random models, and a driver that serves sequences in every awkward way a batch may arrive."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from model.arithmetic import compute_dtype
from model.cache import MemoryBatch, MemoryCache
from model.config import MosaicConfig, MosaicV2Config
from model.kernels.kernel import Kernel, TorchKernel
from model.mosaic_v1 import MemoryMosaic
from model.mosaic_v2 import MemoryMosaicV2
from model.network import MosaicNetwork


def small_config(**changes: Any) -> MosaicConfig:
    """Two layers, two heads, twelve wide; the numbers of the published `Library` code."""
    fields: dict[str, Any] = {
        "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 12, "block_size": 32, "pmem_size": 5, "pmem_count": 1,
        "key_log_scale_max": 5.0, "persistent_key_log_scale_max": 10.0, "norm_eps": 0.0, "logit_scale": 0.25,
        "pre_norm": True, "value_extractor": "lowrlinearconv", "bias": False, "tied": True, "has_persistent": True,
    }  # fmt: skip
    return MosaicConfig(**(fields | changes))


def small_v2_config(**changes: Any) -> MosaicV2Config:
    """Of the second version, with a window so short and delays so that short texts fill every memory."""
    fields: dict[str, Any] = {
        "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 12, "block_size": 32, "persistent_size": 20,
        "short_window": 7, "long_delay": 3, "max_train_delay": 6,
    }  # fmt: skip
    return MosaicV2Config(**(fields | changes))


@st.composite
def v2_configs(draw: st.DrawFn) -> MosaicV2Config:
    """Windows and delays from the shortest on, at odd sizes."""
    n_head, window = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    max_delay = draw(st.integers(1, window))
    return small_v2_config(
        vocab_size=draw(st.integers(1, 17)),
        n_layer=draw(st.integers(1, 2)),
        n_head=n_head,
        n_embd=n_head * draw(st.integers(2, 7)),
        persistent_size=draw(st.integers(1, 9)),
        short_window=window,
        long_delay=draw(st.integers(1, max_delay)),
        max_train_delay=max_delay,
    )


@st.composite
def configs(draw: st.DrawFn) -> MosaicConfig:
    """Every option of the two published variants, at odd sizes."""
    # One number alone is 0 after a norm, and a zero key has no direction.
    n_head, head_dim = draw(st.tuples(st.integers(1, 4), st.integers(1, 7)).filter(lambda sizes: sizes != (1, 1)))
    return small_config(
        vocab_size=draw(st.integers(1, 17)),
        n_layer=draw(st.integers(1, 2)),
        n_head=n_head,
        n_embd=n_head * head_dim,
        pmem_size=draw(st.integers(1, 6)),
        pmem_count=draw(st.integers(1, 3)),
        key_log_scale_max=draw(st.sampled_from([0.5, 5.0, math.log(65535)])),
        persistent_key_log_scale_max=draw(st.sampled_from([0.5, 10.0, math.log(65535)])),
        norm_eps=draw(st.sampled_from([0.0, 1e-10, 0.1])),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
        pre_norm=draw(st.booleans()),
        value_extractor=draw(st.sampled_from(["lowrlinearconv", "linearconv"])),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        has_persistent=draw(st.booleans()),
    )


def random_model(config: MosaicConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> MemoryMosaic:
    """Every parameter drawn, so that none is at a value which hides a mistake (zero biases, unit norms)."""
    torch.manual_seed(seed)
    model = MemoryMosaic(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("leak"):
                parameter.uniform_(-0.5, 0.5)
            elif name.endswith("log_scale"):
                parameter.uniform_(-0.1, 0.2)
            elif "norm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.cast_weights(dtype).eval()


def random_v2_model(config: MosaicV2Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> MemoryMosaicV2:
    """As `random_model`, with gates that differ by orders of magnitude."""
    torch.manual_seed(seed)
    model = MemoryMosaicV2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("log_beta0", "log_beta1", "alpha", "log_scale")):
                parameter.uniform_(-1.2, 1.2)
            elif "norm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("key.gate.weight", "key.decay.weight")):
                parameter.mul_(3)
    return model.cast_weights(dtype).eval()


def draw_ids(vocab_size: int, *lengths: int, seed: int = 1) -> list[Tensor]:
    """Texts of these lengths, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def random_sizes(total: int, seed: int) -> list[int]:
    """Numbers of 1 or more that add up to `total`."""
    rng, sizes = random.Random(seed), list[int]()
    while sum(sizes) < total:
        sizes.append(rng.randint(1, total - sum(sizes)))
    return sizes


def served(
    model: MosaicNetwork,
    sequences: Sequence[Tensor],
    seed: int,
    *,
    block_size: int = 3,
    max_chunk: int = 7,
    kernel: Kernel | None = None,
    memory_dtype: torch.dtype | None = None,
    chunk: Callable[[random.Random], int] = lambda rng: rng.choice([1, 1, 2, 3, 7]),
) -> list[Tensor]:
    """Logits [time, vocab_size] of every token of every sequence, by calls on random batches of them.

    Every call picks some sequences in some order and a number of new tokens for each. Blocks and slots are scattered
    over a cache that is full of other numbers. Short-term blocks are a ring, as long as window and chunks demand.
    By the network's own cached form, or by a kernel made from it.
    """
    kernel = kernel or TorchKernel(model)
    rng, precise = random.Random(seed), compute_dtype(model.dtype)
    blocks_each = [-(-max(len(s) - 1, 1) // block_size) for s in sequences]
    short_each = [min(n, _ring_size(model.config, block_size, max_chunk)) for n in blocks_each]
    num_blocks, num_slots = sum(blocks_each) + sum(short_each) + 2, len(sequences) + 2
    cache = MemoryCache(
        model.config, num_blocks=num_blocks, block_size=block_size, num_slots=num_slots,
        memory_dtype=memory_dtype or precise, state_dtype=precise, keys_by_dimension=kernel.keys_by_dimension,
    )  # fmt: skip
    cache.keys.fill_(37)
    cache.values.fill_(-1e4)
    cache.state.fill_(math.nan)
    free = rng.sample(range(num_blocks), num_blocks)
    tables = [[free.pop() for _ in range(n)] for n in blocks_each]
    rings = [[free.pop() for _ in range(n)] for n in short_each]
    short = [
        [ring[m % len(ring)] for m in range(n)] if ring else [] for n, ring in zip(blocks_each, rings, strict=True)
    ]
    slots = rng.sample(range(num_slots), len(sequences))
    done = [0] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    while todo := [s for s, sequence in enumerate(sequences) if done[s] < len(sequence)]:
        picked = rng.sample(todo, rng.randint(1, len(todo)))
        new = [min(chunk(rng), len(sequences[s]) - done[s]) for s in picked]
        batch = batch_of(
            cache, [slots[s] for s in picked], [tables[s] for s in picked], [done[s] for s in picked], new,
            short_tables=[short[s] for s in picked] if short_each[0] else None,
        )  # fmt: skip
        token_ids = torch.cat([sequences[s][done[s] : done[s] + n] for s, n in zip(picked, new, strict=True)])
        out = kernel.step(token_ids, batch, rows=torch.arange(sum(new)))
        for s, n, rows in zip(picked, new, torch.split(out, new), strict=True):
            done[s] += n
            logits[s].append(rows)
    return [torch.cat(rows) for rows in logits]


def _ring_size(config: object, block_size: int, max_chunk: int) -> int:
    """Blocks that hold the window before a chunk and the pairs that the chunk completes, however they are aligned."""
    if not isinstance(config, MosaicV2Config):
        return 0
    return -(-(config.short_window - 1 + max_chunk) // block_size) + 1


def batch_of(
    cache: MemoryCache,
    slots: list[int],
    tables: list[list[int]],
    num_computed: list[int],
    num_new: list[int],
    short_tables: list[list[int]] | None = None,
) -> MemoryBatch:
    """A batch from lists, its block tables cut to what is needed so far and padded with 0."""
    needed = [-(-(c + n - 1) // cache.block_size) for c, n in zip(num_computed, num_new, strict=True)]

    def padded(lists: list[list[int]]) -> Tensor:
        rows = [table[:n] + [0] * (max(needed) - n) for table, n in zip(lists, needed, strict=True)]
        return torch.tensor(rows, dtype=torch.int64).view(len(slots), max(needed))

    return MemoryBatch(
        cache,
        torch.tensor(slots),
        padded(tables),
        tuple(num_computed),
        tuple(num_new),
        short_tables=None if short_tables is None else padded(short_tables),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error over the largest expected number, or over 0.001 where all are smaller."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-3))


def assert_close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Equal to `rtol` of the largest expected number."""
    error = relative_error(actual, expected)
    assert error <= rtol, f"off by {error:.3g} of the largest number"
