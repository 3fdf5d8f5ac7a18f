"""Words that must not be written, over tokens alone. Knows which tokens spell a word, not what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

START = 0
END = -1

Edge = tuple[int, int, int]


@dataclass(frozen=True)
class BadWords:
    """An automaton that reads tokens: at `START` a word may begin, what leads to `END` completes one.

    `edges` are (node, token id, next node): each says that, with this much of a word written, this token writes more
    of it. So a word is found however it is cut into tokens. No word has more than `max_tokens` tokens.
    """

    edges: tuple[Edge, ...]
    max_tokens: int

    def completing(self, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
        """The tokens that would complete a word after these."""
        width = self.max_tokens - 1
        output = output[-width:] if width else ()
        num_before = min(width - len(output), len(prompt))
        before = prompt[len(prompt) - num_before :]
        nodes = {START}
        for token_id in (*before, *output):
            nodes = {START, *(self._next[node, token_id] for node in nodes if (node, token_id) in self._next)}
        return [token_id for node in nodes for token_id in self._last.get(node, ())]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every id that writes part of a word."""
        return tuple({token_id for _, token_id, _ in self.edges})

    @cached_property
    def _next(self) -> Mapping[tuple[int, int], int]:
        return {(node, token_id): then for node, token_id, then in self.edges if then != END}

    @cached_property
    def _last(self) -> Mapping[int, Sequence[int]]:
        last: dict[int, list[int]] = {}
        for node, token_id, then in self.edges:
            if then == END:
                last.setdefault(node, []).append(token_id)
        return last
