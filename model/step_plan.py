"""StepPlan: where each new token of a ragged batch stands, which pair it completes and which pairs it reads.

Integers only, the same for every layer. Tokens are handled in *packed* order: the first new token of every sequence,
then the second of every sequence that has one, and so on, sequences with more new tokens first. One step of a leaky
average is then a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import MemoryBatch

# A group of sequences is read as one padded rectangle while the padded work stays below this multiple of the real
# work; a sequence that would make it worse starts another group.
_MAX_PADDING = 2.0
# Wasted work that costs no more than the calls of another group would.
_FREE_PADDING = 1024
# What copying one pair out of its block costs, in units of one query reading it.
_GATHER_COST = 4


@dataclass(frozen=True, slots=True)
class ReadGroup:
    """Sequences of similar shape whose reads are one rectangle of queries by pairs."""

    queries: Tensor | None
    """[sequences, asked] packed rows, short sequences repeating their last; None: every row, one per sequence."""
    blocks: Tensor
    """[sequences * heads * blocks] rows of the pool seen as [num_blocks * heads, block_size * dim]."""
    mask: Tensor
    """[sequences, 1, asked, pairs]: 0 where the query sees the pair, -inf where it does not."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Indexes of one call. S sequences, N new tokens, sequences in packed order unless said otherwise."""

    sequences: Tensor
    """[S] the batch's row of each packed sequence."""
    order: Tensor
    """[N] the flat token of each packed row."""
    step_sizes: list[int]
    """How many sequences have a first, a second, ... new token; sums to N."""
    previous: Tensor
    """[N - S] for every packed row but the first S: the row of the token before."""
    last: Tensor
    """[S] the packed row of each sequence's last token."""
    starts: Tensor | None
    """Packed rows of tokens that have no token before them and complete no pair; None: there are none."""
    completing: Tensor | None
    """The other packed rows; None: all."""
    pairs: Tensor
    """[completing rows * heads] rows of the pool seen as [num_blocks * heads * block_size, dim]."""
    groups: list[ReadGroup]
    unpad: Tensor | None
    """[N] the row of each packed row in the groups' concatenated queries; None: the same."""


def plan_step(batch: MemoryBatch, num_heads: int, dtype: torch.dtype) -> StepPlan:
    """Works out the indexes of one call; masks are of `dtype`."""
    return _Planner(batch, num_heads, dtype).plan()


class _Planner:
    def __init__(self, batch: MemoryBatch, num_heads: int, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, batch.cache.device
        self.block_size = batch.cache.block_size
        self.heads = torch.arange(num_heads, device=self.device)
        ranked = sorted(
            range(len(batch.num_new)), key=lambda s: (batch.num_new[s], batch.num_computed[s]), reverse=True
        )
        self.ranked = ranked
        self.new = [batch.num_new[s] for s in ranked]
        self.computed = [batch.num_computed[s] for s in ranked]
        self.tables = batch.block_tables[self._tensor(ranked)]
        firsts = [0]
        for new in batch.num_new:
            firsts.append(firsts[-1] + new)
        self.flat_first = [firsts[s] for s in ranked]

    def plan(self) -> StepPlan:
        # The sequence (by rank) and the offset in it of every packed row.
        sizes = list(_step_sizes(self.new))
        rank = [r for size in sizes for r in range(size)]
        offset = [j for j, size in enumerate(sizes) for _ in range(size)]
        step_start = [0]
        for size in sizes:
            step_start.append(step_start[-1] + size)
        self.step_start = step_start
        position = [self.computed[r] + j for r, j in zip(rank, offset, strict=True)]
        completing = [row for row, p in enumerate(position) if p > 0]
        starts = [row for row, p in enumerate(position) if p == 0]
        spans = list(_spans(self.new, [c + n - 1 for c, n in zip(self.computed, self.new, strict=True)]))
        is_decode = len(sizes) == 1
        return StepPlan(
            sequences=self._tensor(self.ranked),
            order=self._tensor([self.flat_first[r] + j for r, j in zip(rank, offset, strict=True)]),
            step_sizes=sizes,
            previous=self._tensor([step_start[j - 1] + r for r, j in zip(rank, offset, strict=True) if j > 0]),
            last=self._tensor([step_start[new - 1] + r for r, new in enumerate(self.new)]),
            starts=self._tensor(starts) if starts else None,
            completing=self._tensor(completing) if starts else None,
            pairs=self._pair_rows([rank[row] for row in completing], [position[row] - 1 for row in completing]),
            groups=[self._group(a, b, whole=is_decode and len(spans) == 1) for a, b in spans],
            unpad=None if is_decode else self._unpad(spans, rank, offset),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _pair_rows(self, rank: list[int], pair: list[int]) -> Tensor:
        pairs = self._tensor(pair)
        block = self.tables[self._tensor(rank), pairs // self.block_size]
        rows = (block[:, None] * len(self.heads) + self.heads) * self.block_size
        return (rows + (pairs % self.block_size)[:, None]).flatten()

    def _group(self, a: int, b: int, *, whole: bool) -> ReadGroup:
        """Sequences a .. b-1."""
        asked = self.new[a]
        num_pairs = max(self.computed[r] + self.new[r] - 1 for r in range(a, b))
        num_blocks = -(-num_pairs // self.block_size)
        blocks = self.tables[a:b, None, :num_blocks] * len(self.heads) + self.heads[:, None]
        offsets = [[min(j, self.new[r] - 1) for j in range(asked)] for r in range(a, b)]
        rows = [self.step_start[j] + r for r, line in zip(range(a, b), offsets, strict=True) for j in line]
        visible = [self.computed[r] + j for r, line in zip(range(a, b), offsets, strict=True) for j in line]
        # The row of a token that sees nothing is meaningless; `StepPlan.starts` lists it, to be replaced by zeros.
        limit = self._tensor(visible).view(b - a, 1, asked, 1)
        hidden = torch.arange(num_blocks * self.block_size, device=self.device) >= limit
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return ReadGroup(None if whole else self._tensor(rows).view(b - a, asked), blocks.flatten(), mask)

    def _unpad(self, spans: list[tuple[int, int]], rank: list[int], offset: list[int]) -> Tensor:
        first_row: list[int] = []
        total = 0
        for a, b in spans:
            first_row += [total + i * self.new[a] for i in range(b - a)]
            total += (b - a) * self.new[a]
        return self._tensor([first_row[r] + j for r, j in zip(rank, offset, strict=True)])


def _step_sizes(new: list[int]) -> Iterator[int]:
    """How many of the counts, which descend, exceed 0, 1, 2, ..."""
    alive = len(new)
    for step in range(new[0]):
        while new[alive - 1] <= step:
            alive -= 1
        yield alive


def _spans(new: list[int], pairs: list[int]) -> Iterator[tuple[int, int]]:
    """Cuts the ranked sequences into groups whose padding is bearable."""
    start, real, longest = 0, 0.0, 0
    for r, (asked, num_pairs) in enumerate(zip(new, pairs, strict=True)):
        work = (asked + _GATHER_COST) * max(num_pairs, 1)
        padded = (new[start] + _GATHER_COST) * max(longest, num_pairs, 1) * (r + 1 - start)
        if r > start and padded > _MAX_PADDING * (real + work) + _FREE_PADDING:
            yield start, r
            start, real, longest = r, 0.0, 0
        real, longest = real + work, max(longest, num_pairs)
    yield start, len(new)
