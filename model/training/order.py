"""In which order windows are trained on: a function of the seed and the step alone, so that any step can be resumed.

An epoch takes each source's windows `weight` times, shuffled together. A source is gone through in passes: each cuts
it into windows at another offset and takes all of them, in another order, before the next begins. Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model.training.tokens import Ids

Places = NDArray[np.int64]


class WindowOrder:
    """Window number n of endless training, for every n."""

    def __init__(self, sources: Sequence[Ids], weights: Sequence[float], window: int, seed: int) -> None:
        """Raises ValueError, naming the source by its number, where one is shorter than two windows."""
        self._sources, self._weights, self._window, self._seed = sources, weights, window, seed
        # One window less than fits, so that every offset leaves as many.
        self._counts = [(len(ids) - 1) // window - 1 for ids in sources]
        for n, count in enumerate(self._counts):
            if count < 1:
                raise ValueError(f"data.sources.{n}: {len(sources[n])} tokens are less than two windows of {window}")
        self._epoch = lru_cache(2)(self._make_epoch)
        self._pass = lru_cache(2 * len(sources))(self._make_pass)

    def batch(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets [count, window] of the windows numbered from `first` on."""
        rows = np.stack([self._row(n) for n in range(first, first + count)])
        return rows[:, :-1], rows[:, 1:]

    def epoch_of(self, number: int) -> float:
        """How many epochs have been taken before this window."""
        epoch, place = self._locate(number)
        return epoch + place / len(self._epoch(epoch))

    def _row(self, number: int) -> NDArray[np.int64]:
        epoch, place = self._locate(number)
        source, start = self._epoch(epoch)[place]
        return np.asarray(self._sources[source][start : start + self._window + 1], dtype=np.int64)

    def _locate(self, number: int) -> tuple[int, int]:
        epoch = int(number / sum(w * c for w, c in zip(self._weights, self._counts, strict=True)))
        while number >= self._before(epoch + 1):
            epoch += 1
        while number < self._before(epoch):
            epoch -= 1
        return epoch, number - self._before(epoch)

    def _before(self, epoch: int) -> int:
        """Windows in the epochs before."""
        return sum(self._taken(source, epoch) for source in range(len(self._sources)))

    def _taken(self, source: int, epoch: int) -> int:
        return int(epoch * self._weights[source] * self._counts[source])

    def _make_epoch(self, epoch: int) -> Places:
        """[windows, 2]: source and first token of each window, shuffled."""
        parts = []
        for source, count in enumerate(self._counts):
            numbers = np.arange(self._taken(source, epoch), self._taken(source, epoch + 1))
            starts = [self._pass(source, n // count)[n % count] for n in numbers.tolist()]
            parts.append(np.stack([np.full(len(starts), source), np.asarray(starts, dtype=np.int64)], axis=1))
        places = np.concatenate(parts)
        return np.random.default_rng([self._seed, 0, epoch]).permutation(places)

    def _make_pass(self, source: int, number: int) -> Places:
        """First tokens of all windows of one pass through a source."""
        rng = np.random.default_rng([self._seed, 1, source, number])
        offset = int(rng.integers(self._window))
        return rng.permutation(self._counts[source]) * self._window + offset
