"""Who owns which memory block and state slot: a question of counts. What a block holds is the memory cache's affair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from service.engine.sequence import Sequence


class BlockManager:
    """Hands out blocks of pairs and state slots from fixed pools.

    A sequence of n tokens has n - 1 complete pairs (pair t completes when token t + 1 arrives), so it needs
    ceil((n - 1) / block_size) blocks, and one slot for the fixed part of its state.
    """

    def __init__(self, num_blocks: int, block_size: int, num_slots: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_slots = num_slots
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_blocks)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold all complete pairs of `num_tokens` tokens."""
        return -(-max(num_tokens - 1, 0) // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int, reserve: int = 0) -> bool:
        """Whether `sequence` can hold `num_tokens` tokens and still leave `reserve` blocks free."""
        missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        return missing <= 0 or missing + reserve <= len(self._free_blocks)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Extends the block table of `sequence` to hold `num_tokens` tokens. The caller asked `can_grow`."""
        missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        for _ in range(missing):
            sequence.block_table.append(self._free_blocks.pop())

    def take_slot(self, sequence: Sequence) -> None:
        sequence.slot = self._free_slots.pop()

    def release(self, sequence: Sequence) -> None:
        """Takes back all that `sequence` holds. Harmless when it holds nothing."""
        self._free_blocks.extend(reversed(sequence.block_table))
        sequence.block_table.clear()
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError unless every block and slot is either free or held by exactly one of `holders`."""
        holders = list(holders)
        blocks = Counter(self._free_blocks)
        slots = Counter(self._free_slots)
        for sequence in holders:
            blocks.update(sequence.block_table)
            if sequence.slot is not None:
                slots[sequence.slot] += 1
        _assert_each_once("block", blocks, self.num_blocks)
        _assert_each_once("slot", slots, self.num_slots)


def _assert_each_once(noun: str, counts: Counter[int], size: int) -> None:
    wrong = {i: counts[i] for i in range(size) if counts[i] != 1}
    unknown = sorted(set(counts) - set(range(size)))
    if wrong or unknown:
        raise AssertionError(f"{noun}s not owned exactly once: {wrong}; unknown {noun}s: {unknown}")
