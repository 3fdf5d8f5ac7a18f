"""Which tokens a text has, and how often it wrote each itself: kept from token to token, not read anew for each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class TokenCounts:
    """`ids` are the tokens of a prompt and of what follows it, each once; `times` says how often each follows it."""

    __slots__ = ("_places", "ids", "times")

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt))
        self.times = array("q", bytes(self.ids.itemsize * len(self.ids)))
        self._places = {token_id: place for place, token_id in enumerate(self.ids)}
        for token_id in output:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """One more token has been written."""
        place = self._places.get(token_id)
        if place is None:
            self._places[token_id] = len(self.ids)
            self.ids.append(token_id)
            self.times.append(1)
        else:
            self.times[place] += 1
