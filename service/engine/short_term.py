"""Who holds the blocks of a short-term memory: of every running sequence, those with pairs in its window.

Integers only. Which texts can be gone on with is the prefix cache's affair; here it is known which of them lack nothing
of their window.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from service.engine.sequence import Sequence


def short_blocks_of_window(num_pairs: int, block_size: int) -> int:
    """Blocks that a window of so many pairs touches at most, however it lies."""
    return -(-num_pairs // block_size) + 1


class ShortTermBlocks:
    """Hands out blocks `first_block` .. `first_block + num_blocks - 1`, which no other memory uses.

    The token at position t sees the pairs t - window .. t - 1. A block of pairs that no later token of a sequence sees
    is let go: `Sequence.short_table` has None in its place. One that nobody holds is idle while its text has a key,
    else free; idle ones are evicted, the least recently used first, when no free one is left.
    """

    def __init__(self, first_block: int, num_blocks: int, block_size: int, window: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
        self._first_block = first_block
        self._free = list(range(first_block + num_blocks - 1, first_block - 1, -1))
        self._num_holders = Counter[int]()
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, list[bytes]] = {}
        # From the least to the most recently used.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @staticmethod
    def num_needed(window: int, block_size: int, *, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Blocks that suffice for any step: the window before each sequence's new tokens, and what they complete."""
        each = short_blocks_of_window(window, block_size) + 1
        return max_num_seqs * each + -(-max_num_batched_tokens // block_size)

    def first_seen(self, position: int) -> int:
        """The first block that the token at `position`, or a later one, sees anything of."""
        return max(position - self.window, 0) // self.block_size

    def extend(self, sequence: Sequence, num_blocks: int) -> None:
        """Gives `sequence` what it lacks of its first `num_blocks` blocks."""
        while len(sequence.short_table) < num_blocks:
            self.append(sequence)

    def append(self, sequence: Sequence) -> int:
        """Gives `sequence` one block more; returns it."""
        block = self._free.pop() if self._free else self._evict()
        self._num_holders[block] = 1
        sequence.short_table.append(block)
        return block

    def append_copy(self, sequence: Sequence, block: int) -> tuple[int, int]:
        """Gives `sequence` one block more, which is to begin as a copy of `block`; returns what to copy (from, to)."""
        if block in self._idle:
            self._idle.move_to_end(block)
        return block, self.append(sequence)

    def trim(self, sequence: Sequence) -> None:
        """Lets go of what the tokens that `sequence` has not absorbed do not see."""
        table = sequence.short_table
        for m in range(min(self.first_seen(sequence.num_computed_tokens), len(table)) - 1, -1, -1):
            block = table[m]
            if block is None:
                return
            self._let_go(block)
            table[m] = None

    def release(self, sequence: Sequence) -> None:
        """Takes back all that `sequence` holds. Harmless when it holds nothing."""
        for block in sequence.short_table:
            if block is not None:
                self._let_go(block)
        sequence.short_table.clear()

    def book(self, key: bytes, block: int | None) -> None:
        """The pairs in `block` are those of the text `key`. Where another block has them already, that one stays."""
        if block is not None and key not in self._blocks:
            self._blocks[key] = block
            self._keys.setdefault(block, []).append(key)

    def find(self, keys: SequenceOf[bytes], num_tokens: int) -> list[int | None] | None:
        """The table of a sequence that goes on after `num_tokens` tokens in blocks with these keys; None: it cannot."""
        first = min(self.first_seen(num_tokens), len(keys))
        found = [self._blocks.get(key) for key in keys[first:]]
        return None if None in found else [*[None] * first, *found]

    def share(self, sequence: Sequence, table: SequenceOf[int | None]) -> None:
        """Gives `sequence`, which holds nothing, the blocks of a table that was found."""
        for block in table:
            if block is not None:
                self._num_holders[block] += 1
                self._idle.pop(block, None)
        sequence.short_table.extend(table)

    @property
    def num_idle_blocks(self) -> int:
        return len(self._idle)

    def _let_go(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block] == 0:
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        for key in self._keys.pop(block):
            del self._blocks[key]
        return block

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError unless every block is free, idle, or held in a window by those of `holders` counted."""
        held = Counter[int]()
        for sequence in holders:
            first = self.first_seen(sequence.num_computed_tokens)
            assert not any(block is not None for block in sequence.short_table[:first]), "a block out of the window"
            held.update(block for block in sequence.short_table if block is not None)
        assert +self._num_holders == held, "holders are miscounted"
        all_blocks = range(self._first_block, self._first_block + self.num_blocks)
        assert sorted([*self._free, *self._idle, *held]) == list(all_blocks), "blocks are lost or in two places"
        assert all(block in self._keys for block in self._idle)
        assert {key: block for block, keys in self._keys.items() for key in keys} == self._blocks
