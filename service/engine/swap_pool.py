"""Blocks that had to leave the memory cache and wait in a second pool, on the other side of a bus. Integers only."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple


class Swap(NamedTuple):
    """A block, the slot of its snapshot, and the place of both in the pool."""

    block: int
    slot: int
    place: int


class SwapPool:
    """Which text lies in which of `num_places` places; the one sent least recently makes room.

    What is to be moved is collected until a step takes it. All moves of a step see memory as it was before the step.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self.num_outs = 0
        self.num_ins = 0
        self._free = list(range(num_places - 1, -1, -1))
        # From the one sent least recently on.
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._outs: dict[int, Swap] = {}
        self._ins: dict[int, Swap] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that wait here."""
        return len(self._places)

    def place_of(self, key: bytes) -> int | None:
        """From where the text can be brought back in the next step; None also where it is only just leaving."""
        place = self._places.get(key)
        return None if place in self._outs else place

    def send(self, key: bytes, block: int, slot: int) -> None:
        """`block` is about to be used for something else."""
        if self._ins.pop(block, None):
            return  # it has not come back yet
        if key in self._places:
            self._places.move_to_end(key)
        elif self.num_places:
            place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
            self._places[key] = place
            self._outs[place] = Swap(block, slot, place)

    def bring_back(self, place: int, block: int, slot: int) -> None:
        """`block` is to hold what is at `place`, even if that is to be overwritten in the same step."""
        self._ins[block] = Swap(block, slot, place)

    def take(self) -> tuple[tuple[Swap, ...], tuple[Swap, ...]]:
        """What is to be moved out and in before a step that will take place."""
        outs, ins = tuple(self._outs.values()), tuple(self._ins.values())
        self._outs, self._ins = {}, {}
        self.num_outs += len(outs)
        self.num_ins += len(ins)
        return outs, ins

    def check_integrity(self) -> None:
        """Raises AssertionError where a place is lost or has two owners, or a move has none."""
        assert sorted([*self._free, *self._places.values()]) == list(range(self.num_places))
        assert self._outs.keys() <= set(self._places.values())
