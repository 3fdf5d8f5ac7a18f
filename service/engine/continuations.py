"""Which texts in memory go on from one beginning, and how far a new text goes with them. Integers and keys only."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

# A beginning that thousands of texts share, each going on in its own way, costs a new one no more than this.
_MAX_COMPARED = 8


class Continuations:
    """The tokens of every text that follows a text `parent`, both known by their keys."""

    def __init__(self) -> None:
        self._token_ids: dict[bytes, tuple[bytes, array[int]]] = {}
        self._keys: dict[bytes, dict[bytes, None]] = {}

    def add(self, parent: bytes, key: bytes, token_ids: Sequence[int]) -> None:
        """`key` is `parent`, and then `token_ids`."""
        self._token_ids[key] = (parent, array("I", token_ids))
        self._keys.setdefault(parent, {})[key] = None

    def remove(self, key: bytes) -> None:
        """Harmless when it is not there."""
        if entry := self._token_ids.pop(key, None):
            siblings = self._keys[entry[0]]
            del siblings[key]
            if not siblings:
                del self._keys[entry[0]]

    def num_common(self, parent: bytes, token_ids: Sequence[int]) -> int:
        """How many tokens `token_ids` and one of the latest texts after `parent` begin with alike, at most."""
        return max((_num_common(token_ids, self._token_ids[key][1]) for key in self._latest(parent)), default=0)

    def longest(self, parent: bytes, token_ids: Sequence[int]) -> tuple[bytes | None, int]:
        """The longest of the latest texts after `parent` that `token_ids` begins with, and how many tokens it adds."""
        found: tuple[bytes | None, int] = (None, 0)
        for key in self._latest(parent):
            theirs = self._token_ids[key][1]
            if found[1] < len(theirs) == _num_common(token_ids, theirs):
                found = key, len(theirs)
        return found

    def _latest(self, parent: bytes) -> list[bytes]:
        keys = reversed(self._keys.get(parent, {}))
        return [key for key, _ in zip(keys, range(_MAX_COMPARED), strict=False)]

    def check_integrity(self, keys: set[bytes]) -> None:
        """Raises AssertionError unless it knows these keys and no others."""
        assert set(self._token_ids) == keys, "a text and what it follows contradict each other"
        assert keys == {key for siblings in self._keys.values() for key in siblings}


def _num_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return i
    return min(len(ours), len(theirs))
