"""MemoryCache: the tensors in which sequences remember, in pooled blocks of pairs and slots of state.

Who owns which block or slot, and when, is decided elsewhere and arrives as a `MemoryBatch` with every call.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import MosaicV2Config, NetworkConfig

NUM_STATE_VECTORS = 3
"""Of the first version. Per layer and sequence: both leaky averages, and what the last token contributes to its pending
pair's value.

This is all that a sequence has besides its pairs: a slot that keeps it as it was after n tokens is a snapshot, from
which, with the pairs of those tokens, any sequence with the same first n tokens goes on exactly.
"""

NUM_STATE_VECTORS_V2 = 5
"""Of the second version; what they are is in `model.cached_past_v2`."""

LOOK_AHEAD = 1
"""A pair is complete once so many tokens after its own are known: n tokens have n - LOOK_AHEAD complete pairs.

So block m is complete, and the state worth a snapshot, after (m + 1) * block_size + LOOK_AHEAD tokens.
"""


def pooled_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Zeros of `shape`. On a CPU in huge pages where the system has them, and taken from it at once.

    Reading at random from pages of 4 KiB costs half of the bandwidth. A page that is first taken when it is written to
    is cleared while a request waits, and may be missing in the middle of serving.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Private: systems that give huge pages on request often give none to shared memory.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Some kernels are built without huge pages.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape).zero_()


class MemoryCache:
    """Pooled memory for many sequences. Holds numbers, knows no sequence.

    `keys` and `values`, [n_layer, num_blocks, n_head, block_size, head_dim] of `memory_dtype`: unit vectors, which even
    float16 holds safely; the scales of a head are applied when they are read.
    With `keys_by_dimension` the last two of `keys` are swapped, [..., head_dim, block_size]: one load then covers the
    same dimension of many pairs.
    `state`, [n_layer, num_slots, 3 or 5, n_embd] of `state_dtype`: see `NUM_STATE_VECTORS`.
    """

    def __init__(
        self,
        config: NetworkConfig,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        device: str | torch.device = "cpu",
        memory_dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        keys_by_dimension: bool = False,
    ) -> None:
        for name, size in (("num_blocks", num_blocks), ("block_size", block_size), ("num_slots", num_slots)):
            if size < 1:
                raise ValueError(f"{name}: expected 1 or more, got {size}")
        self.block_size = block_size
        self.keys_by_dimension = keys_by_dimension
        pairs = (config.n_layer, num_blocks, config.n_head, block_size, config.head_dim)
        state = (config.n_layer, num_slots, _num_state_vectors(config), config.n_embd)
        # Zeros, since what a block held before is read, and then given no weight: it must be finite.
        keys = (*pairs[:-2], pairs[-1], pairs[-2]) if keys_by_dimension else pairs
        self.keys = pooled_zeros(keys, memory_dtype, device)
        self.values = pooled_zeros(pairs, memory_dtype, device)
        self.state = pooled_zeros(state, state_dtype, device)

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def num_slots(self) -> int:
        return self.state.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the pairs of blocks into others, no target twice; all are read before any is written."""
        for pool in (self.keys, self.values):
            _write_rows(pool, targets, _read_rows(pool, sources))

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the state in slots into others, as `copy_blocks` does pairs."""
        _write_rows(self.state, targets, _read_rows(self.state, sources))

    def read(self, blocks: Sequence[int], slots: Sequence[int]) -> tuple[Tensor, ...]:
        """A copy of the pairs in blocks and of the state in slots, for `write`, here or in a cache elsewhere."""
        return _read_rows(self.keys, blocks), _read_rows(self.values, blocks), _read_rows(self.state, slots)

    def write(self, blocks: Sequence[int], slots: Sequence[int], contents: tuple[Tensor, ...]) -> None:
        """Puts in what `read` has read, from a cache of the same network and layout."""
        for pool, rows, content in zip(
            (self.keys, self.values, self.state), (blocks, blocks, slots), contents, strict=True
        ):
            _write_rows(pool, rows, content)

    @staticmethod
    def block_bytes(config: NetworkConfig, block_size: int, memory_dtype: torch.dtype) -> int:
        """Bytes that one block of `block_size` pairs takes, over all layers."""
        return 2 * config.n_layer * block_size * config.n_embd * memory_dtype.itemsize

    @staticmethod
    def slot_bytes(config: NetworkConfig, state_dtype: torch.dtype) -> int:
        """Bytes that the state of one sequence takes, over all layers."""
        return _num_state_vectors(config) * config.n_layer * config.n_embd * state_dtype.itemsize


@dataclass(frozen=True, slots=True)
class MemoryBatch:
    """What one call adds to which sequences of a cache. Sequences differ in length and in the number of new tokens.

    `slots` is [sequences] int64, `block_tables` [sequences, max_blocks] int64, padded with any valid block. Sequence s
    has absorbed `num_computed[s]` tokens before this call and brings `num_new[s]` >= 1 more; with 0 absorbed it
    starts anew, whatever its slot held. Pair p of a sequence lies in block `block_tables[s, p // block_size]` at
    `p % block_size`; after n tokens there are n - 1 pairs. Two sequences of a batch share no slot, and no block that
    this call writes to.

    A model with a short-term memory has its pairs in `short_tables`, likewise; with any valid block in place of one
    that lies before the window of the first new token.

    `snapshots`, if any, is [tokens] int64: the slot that is to keep the state as it is after each new token, -1 for
    none. No such slot may be one of `slots`, or named twice. Raises ValueError where sizes contradict each other.
    """

    cache: MemoryCache
    slots: Tensor
    block_tables: Tensor
    num_computed: tuple[int, ...]
    num_new: tuple[int, ...]
    snapshots: Tensor | None = None
    short_tables: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.num_computed), len(self.num_new), self.slots.shape[0], self.block_tables.shape[0]}
        if len(sizes) != 1 or self.slots.ndim != 1 or self.block_tables.ndim != 2:
            raise ValueError("slots, block_tables, num_computed and num_new do not describe the same sequences")
        if not self.num_new or min(self.num_new) < 1 or min(self.num_computed) < 0:
            raise ValueError("a batch needs a sequence, and every sequence a new token")
        if self.max_pairs > self.block_tables.shape[1] * self.cache.block_size:
            raise ValueError(f"block_tables have no room for {self.max_pairs} pairs")
        if self.short_tables is not None and self.short_tables.shape != self.block_tables.shape:
            raise ValueError("short_tables and block_tables are not of the same shape")
        if self.snapshots is not None and self.snapshots.shape != (self.num_tokens,):
            raise ValueError(f"snapshots: expected [{self.num_tokens}], got {list(self.snapshots.shape)}")

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together."""
        return sum(self.num_new)

    @property
    def max_pairs(self) -> int:
        """Pairs of the longest sequence after this call."""
        return max(computed + new for computed, new in zip(self.num_computed, self.num_new, strict=True)) - 1


def _read_rows(pool: Tensor, rows: Sequence[int]) -> Tensor:
    """pool [n_layer, all rows, ...] -> [n_layer, rows, ...]."""
    return pool.index_select(1, torch.tensor(rows, dtype=torch.int64, device=pool.device))


def _write_rows(pool: Tensor, rows: Sequence[int], content: Tensor) -> None:
    pool.index_copy_(1, torch.tensor(rows, dtype=torch.int64, device=pool.device), content.to(pool.device))


def _num_state_vectors(config: NetworkConfig) -> int:
    return NUM_STATE_VECTORS_V2 if isinstance(config, MosaicV2Config) else NUM_STATE_VECTORS


class SimpleMemory:
    """A cache for a fixed number of sequences, each with room for `max_tokens`: for scripts, evaluation and tests.

    A short-term memory's blocks are not freed.
    """

    def __init__(
        self,
        config: NetworkConfig,
        num_sequences: int,
        max_tokens: int,
        *,
        block_size: int = 16,
        device: str | torch.device = "cpu",
        memory_dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        keys_by_dimension: bool = False,
    ) -> None:
        blocks_each = max(1, -(-(max_tokens - 1) // block_size))
        num_blocks, num_tables = num_sequences * blocks_each, 2 if isinstance(config, MosaicV2Config) else 1
        self.cache = MemoryCache(
            config,
            num_blocks=num_tables * num_blocks,
            block_size=block_size,
            num_slots=num_sequences,
            device=device,
            memory_dtype=memory_dtype,
            state_dtype=state_dtype,
            keys_by_dimension=keys_by_dimension,
        )
        self.num_tokens = [0] * num_sequences
        blocks = torch.arange(self.cache.num_blocks, device=self.cache.device)
        self._tables = blocks.view(num_tables, num_sequences, blocks_each)

    def extend(self, num_new: Sequence[int]) -> MemoryBatch:
        """The batch in which sequence s brings `num_new[s]` tokens, and sits out if that is 0; counts them."""
        rows = [s for s, new in enumerate(num_new) if new > 0]
        batch = MemoryBatch(
            self.cache,
            torch.tensor(rows, device=self.cache.device),
            self._tables[0, rows],
            tuple(self.num_tokens[s] for s in rows),
            tuple(num_new[s] for s in rows),
            short_tables=self._tables[1, rows] if len(self._tables) > 1 else None,
        )
        for s in rows:
            self.num_tokens[s] += num_new[s]
        return batch
