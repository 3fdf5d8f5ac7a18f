"""Who holds each memory block: how many, and, where it is one, which. Kept such that a look at all blocks is a copy."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from service.engine.sequence import Sequence

FREE, IDLE, SHARED, FIRST_OWNER = 0, 1, 2, 3
_NUM_OWNERS = 250


class BlockHolders:
    """Counts the sequences that hold each block, for the one thread that changes them; any thread may take the map.

    A block that nobody holds is FREE, or IDLE where its text can be found again: the caller says which.
    """

    def __init__(self, num_blocks: int) -> None:
        self._counts = [0] * num_blocks
        # The owners of each block, all combined by exclusive or: of a single one it is the number itself.
        self._owners = [0] * num_blocks
        self._map = bytearray(num_blocks)

    def __getitem__(self, block: int) -> int:
        """How many hold `block`."""
        return self._counts[block]

    @property
    def counts(self) -> SequenceOf[int]:
        return self._counts

    def map(self) -> bytes:
        """A byte for each block: FREE, IDLE, SHARED, or FIRST_OWNER plus its holder's state slot, modulo 250."""
        return bytes(self._map)

    def add(self, block: int, sequence: Sequence) -> None:
        """`sequence`, whose slot does not change from now on, holds `block`."""
        self._counts[block] += 1
        self._owners[block] ^= _owner(sequence)
        self._map[block] = self._state(block)

    def remove(self, block: int, sequence: Sequence) -> bool:
        """`sequence` holds `block` no longer. Whether anybody else does."""
        self._counts[block] -= 1
        self._owners[block] ^= _owner(sequence)
        self._map[block] = self._state(block)
        return self._counts[block] > 0

    def rest(self, block: int) -> None:
        """`block`, which nobody holds, is kept for whoever begins alike."""
        self._map[block] = IDLE

    def _state(self, block: int) -> int:
        count = self._counts[block]
        return FIRST_OWNER + self._owners[block] if count == 1 else SHARED if count else FREE

    def check_integrity(self, holders: Iterable[Sequence], idle: Iterable[int]) -> None:
        """Raises AssertionError unless the map is what a walk over all holders finds."""
        expected = bytearray(len(self._counts))
        for block in idle:
            expected[block] = IDLE
        for sequence in holders:
            for block in sequence.block_table:
                expected[block] = FIRST_OWNER + _owner(sequence) if expected[block] <= IDLE else SHARED
        assert self._map == expected, "the map of blocks is out of date"


def _owner(sequence: Sequence) -> int:
    return (sequence.slot or 0) % _NUM_OWNERS
