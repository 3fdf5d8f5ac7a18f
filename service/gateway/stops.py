"""Finding stop strings in text that arrives in pieces. Knows no tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_ROOT = 0


class StopSet:
    """The stop strings of a request as an automaton (Aho and Corasick, 1975). Immutable: choices share one.

    A node stands for a prefix of some stop string. While reading a text, the node reached is the longest suffix of
    it that is such a prefix, which is exactly the text that must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty strings."""
        self.stops = tuple(dict.fromkeys(stops))
        self._next: list[dict[str, int]] = [{}]
        self._fail: list[int] = [_ROOT]
        self.depth: list[int] = [0]
        self.match: list[str | None] = [None]
        for stop in self.stops:
            self._add(stop)
        self._link()

    def step(self, node: int, char: str) -> int:
        """The node reached from `node` by reading one more character."""
        while True:
            found = self._next[node].get(char)
            if found is not None:
                return found
            if node == _ROOT:
                return _ROOT
            node = self._fail[node]

    def extendable(self, node: int) -> int:
        """The longest suffix of `node` that more text could still complete to a stop string."""
        while not self._next[node] and node != _ROOT:
            node = self._fail[node]
        return node

    def _add(self, stop: str) -> None:
        node = _ROOT
        for char in stop:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self._fail.append(_ROOT)
                self.depth.append(self.depth[node] + 1)
                self.match.append(None)
            node = self._next[node][char]
        self.match[node] = stop

    def _link(self) -> None:
        queue = deque(self._next[_ROOT].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                self._fail[child] = self.step(self._fail[node], char)
                # The longer of two strings that end here is the node's own: it began first.
                self.match[child] = self.match[child] or self.match[self._fail[child]]
                queue.append(child)


class StopFinder:
    """Lets text through up to the first stop string, holding back only what could still become one.

    Of several stop strings the one completed first counts, and of those completed by the same character the one
    that began first. So the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: StopSet) -> None:
        self._stops = stops
        self._node = _ROOT
        self._held = ""

    def push(self, text: str, is_armed: bool = True) -> tuple[str, str | None]:
        """The text set free by `text`, and the stop string that `text` completed, if any.

        Text before the stop string is set free, it and what follows never. Call no more after a match. While not
        `is_armed`, stop strings are let through as text.
        """
        stops, node = self._stops, self._node
        whole = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            node = stops.step(node, char)
            found = stops.match[node]
            if found is not None and is_armed:
                self._held = ""
                return whole[: end - len(found)], found
        self._node = stops.extendable(node)
        free = len(whole) - stops.depth[self._node]
        self._held = whole[free:]
        return whole[:free], None

    def flush(self) -> str:
        """The text held back, now that no more follows."""
        held, self._held, self._node = self._held, "", _ROOT
        return held
