"""Who holds which memory block and state slot: a question of counts. What a block contains is the memory cache's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from service.engine.block_holders import BlockHolders
from service.engine.prefix_cache import CachedPrefix, PrefixCache, StateSnapshot
from service.engine.sequence import Sequence
from service.engine.short_term import ShortTermBlocks
from service.engine.swap_pool import SwapPool


class BlockManager:
    """Hands out blocks of pairs and state slots from fixed pools.

    A sequence of n tokens has n - look_ahead complete pairs (pair t completes when token t + look_ahead arrives) in as
    many blocks as those fill, and one slot for the fixed part of its state. Sequences that begin alike hold the same
    blocks, none of which is written to any more. A block that nobody holds is idle while its text can be found in the
    prefix cache, else free; idle ones are evicted when no free one is left. Blocks of a short-term memory, where there
    is one, come from a pool of their own, which suffices for every step.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        *,
        look_ahead: int = 1,
        has_prefix_cache: bool = True,
        short_term: ShortTermBlocks | None = None,
        num_swap_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_slots = num_slots
        self.look_ahead = look_ahead
        self.short_term = short_term
        self.swap_pool = SwapPool(num_swap_blocks)
        self.prefix_cache = PrefixCache(
            num_blocks, block_size, num_slots, look_ahead, is_enabled=has_prefix_cache, swap_pool=self.swap_pool
        )
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._holders = BlockHolders(num_blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, idle ones included."""
        return len(self._free_blocks) + self.prefix_cache.num_idle_blocks

    def map(self) -> bytes:
        """What each block is just now, see `BlockHolders.map`. Any thread may ask."""
        return self._holders.map()

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold all complete pairs of `num_tokens` tokens."""
        return -(-max(num_tokens - self.look_ahead, 0) // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `sequence` can hold `num_tokens` tokens."""
        if self._has_room(sequence, num_tokens):
            return True
        return self.num_blocks_for(num_tokens) - len(sequence.block_table) <= self.num_free_blocks

    def _has_room(self, sequence: Sequence, num_tokens: int) -> bool:
        return num_tokens - self.look_ahead <= len(sequence.block_table) * self.block_size

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Extends the block table of `sequence` to hold `num_tokens` tokens. The caller asked `can_grow`."""
        if self._has_room(sequence, num_tokens):  # as for nearly every token
            return
        for _ in range(self.num_blocks_for(num_tokens) - len(sequence.block_table)):
            block = self._free_blocks.pop() if self._free_blocks else self.prefix_cache.evict()
            self._holders.add(block, sequence)
            sequence.block_table.append(block)

    def find(self, sequence: Sequence) -> CachedPrefix:
        """The longest prefix in memory that `sequence` can go on from, with a token left to absorb.

        Brings back what lies in the swap pool; otherwise changes nothing.
        """
        prefix = self.prefix_cache.find(sequence)
        if brought := self.prefix_cache.bring_back(sequence, prefix, self._free_blocks):
            for block in brought:
                self._holders.rest(block)
            prefix = self.prefix_cache.find(sequence)
        if self.short_term is None:
            return prefix
        keys = self.prefix_cache.keys(sequence, prefix.num_tokens)
        while prefix.num_tokens:
            table = self.short_term.find(keys, prefix.num_tokens)
            if table is not None:
                tail = table.pop() if prefix.tail is not None else None
                return replace(prefix, short_table=tuple(table), short_tail=tail)
            prefix = self.prefix_cache.shorter(prefix)
            keys = keys[: len(prefix.blocks)]
        return prefix

    def can_begin(self, sequence: Sequence, prefix: CachedPrefix, reserve: int = 0) -> bool:
        """Whether blocks for all tokens of `sequence` can be had, those of `prefix` shared, with `reserve` left."""
        missing = self.num_blocks_for(sequence.num_tokens) - len(prefix.blocks)
        woken = sum(self._holders[block] == 0 for block in prefix.blocks)
        return missing + woken + reserve <= self.num_free_blocks

    def begin(self, sequence: Sequence, prefix: CachedPrefix) -> list[tuple[int, int]]:
        """Gives `sequence` blocks for all its tokens, those of `prefix` shared. The caller asked `can_begin`.

        Returns the blocks that must be copied (from, to), as the snapshot of `prefix` must be, before anything else is
        written to memory.
        """
        for block in prefix.blocks:
            self._holders.add(block, sequence)
            self.prefix_cache.use(block)
        sequence.block_table.extend(prefix.blocks)
        if self.short_term is not None:
            self.short_term.share(sequence, prefix.short_table)
        self.prefix_cache.begin(sequence, prefix)
        self.grow(sequence, sequence.num_tokens)
        if prefix.tail is None:
            return []
        copies = [(prefix.tail, sequence.block_table[len(prefix.blocks)])]
        if self.short_term is not None and prefix.short_tail is not None:
            copies.append(self.short_term.append_copy(sequence, prefix.short_tail))
        return copies

    def reach(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes ready for `sequence` to absorb all but the rest of its first `num_tokens` tokens in the next step."""
        if self.short_term is not None:
            self.short_term.extend(sequence, self.num_blocks_for(num_tokens))

    def book(self, sequence: Sequence, snapshots: tuple[StateSnapshot, ...]) -> None:
        """`sequence` has absorbed what was planned, and these states were kept."""
        if snapshots:
            self.prefix_cache.book(sequence, snapshots)
        if self.short_term is None:
            return
        for snapshot in snapshots:
            num_blocks = self.num_blocks_for(snapshot.num_tokens)
            key = self.prefix_cache.keys(sequence, snapshot.num_tokens)[-1]
            self.short_term.book(key, sequence.short_table[num_blocks - 1])
        self.short_term.trim(sequence)

    def take_slot(self, sequence: Sequence) -> None:
        sequence.slot = self._free_slots.pop()

    def release(self, sequence: Sequence) -> None:
        """Takes back all that `sequence` holds. Harmless when it holds nothing."""
        self.prefix_cache.end(sequence)
        # Last blocks first: they are the first to be evicted, since without those before them they are of no use.
        for block in reversed(sequence.block_table):
            if not self._holders.remove(block, sequence):
                self._let_go(block)
        sequence.block_table.clear()
        if self.short_term is not None:
            self.short_term.release(sequence)
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None

    def _let_go(self, block: int) -> None:
        if self.prefix_cache.is_cached(block):
            self.prefix_cache.rest(block)
            self._holders.rest(block)
        else:
            self._free_blocks.append(block)

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError unless every block and slot is free, idle, or held by those of `holders` counted."""
        holders = list(holders)
        held = Counter(block for sequence in holders for block in sequence.block_table)
        assert self._holders.counts == [held[block] for block in range(self.num_blocks)], "holders are miscounted"
        idle = [block for block in range(self.num_blocks) if self.prefix_cache.is_idle(block)]
        _assert_each_once("block", Counter([*self._free_blocks, *idle, *held.keys()]), self.num_blocks)
        slots = [sequence.slot for sequence in holders if sequence.slot is not None]
        _assert_each_once("slot", Counter([*self._free_slots, *slots]), self.num_slots)
        self._holders.check_integrity(holders, idle)
        self.prefix_cache.check_integrity(self._holders.counts, holders)
        if self.short_term is not None:
            self.short_term.check_integrity(holders)


def _assert_each_once(noun: str, counts: Counter[int], size: int) -> None:
    wrong = {i: counts[i] for i in range(size) if counts[i] != 1}
    unknown = sorted(set(counts) - set(range(size)))
    if wrong or unknown:
        raise AssertionError(f"{noun}s not owned exactly once: {wrong}; unknown {noun}s: {unknown}")
