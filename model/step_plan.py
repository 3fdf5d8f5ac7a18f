"""StepPlan: where each new token of a ragged batch stands, which pairs it completes and which pairs it reads.

Integers only, the same for every layer. Tokens are handled in *packed* order: the first new token of every sequence,
then the second of every sequence that has one, and so on, sequences with more new tokens first. One step of a leaky
average is then a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class View:
    """One memory of a batch: where its blocks are, and which of its pairs token t sees: t - window .. t - delay."""

    block_tables: Tensor
    """As `MemoryBatch.block_tables`. Of a block that no token of the call sees or completes any valid one may stand."""
    delay: int = 1
    window: int | None = None
    """None: all since the beginning."""

    def first(self, position: int) -> int:
        """The first pair that the token at `position` may see."""
        return 0 if self.window is None else max(position - self.window, 0)

    def end(self, position: int) -> int:
        """One more than the last such pair; 0 where there is none."""
        return max(position - self.delay + 1, 0)


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
class ReadPlan:
    """What the tokens of a call complete in one memory, and what they read there."""

    completing: Tensor | None
    """Packed rows of tokens that complete a pair; None: all."""
    pairs: Tensor
    """[completing rows * heads] rows of the pool seen as [num_blocks * heads * block_size, dim]."""
    groups: list[ReadGroup]
    unpad: Tensor | None
    """[N] the row of each packed row in the groups' concatenated queries; None: the same."""
    blind: Tensor | None
    """Packed rows of tokens that see no pair at all; None: there are none."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Indexes of one call. S sequences, N new tokens, sequences in packed order unless said otherwise."""

    sequences: Tensor
    """[S] the batch's row of each packed sequence."""
    order: Tensor
    """[N] the flat token of each packed row."""
    positions: Tensor
    """[N] how many tokens precede each packed row in its sequence."""
    step_sizes: list[int]
    """How many sequences have a first, a second, ... new token; sums to N."""
    previous: Tensor
    """[N - S] for every packed row but the first S: the row of the token before."""
    last: Tensor
    """[S] the packed row of each sequence's last token."""
    kept_rows: Tensor
    """[S and snapshots] the packed rows after which the state is kept: `last`, then where snapshots are wanted."""
    kept_slots: Tensor
    """The slots for those states."""
    starts: Tensor | None
    """Packed rows of tokens that have no token before them; None: there are none."""
    reads: tuple[ReadPlan, ...]
    """Of every memory in the order in which they were given."""


def plan_step(batch: MemoryBatch, num_heads: int, dtype: torch.dtype, views: Sequence[View]) -> StepPlan:
    """Works out the indexes of one call; masks are of `dtype`."""
    return _Planner(batch, num_heads, dtype).plan(views)


class _Planner:
    def __init__(self, batch: MemoryBatch, num_heads: int, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, batch.cache.device
        self.block_size = batch.cache.block_size
        self.heads = torch.arange(num_heads, device=self.device)
        ranked = sorted(
            range(len(batch.num_new)), key=lambda s: (batch.num_new[s], batch.num_computed[s]), reverse=True
        )
        self.ranked = self._tensor(ranked)
        self.slots, self.snapshots = batch.slots[self.ranked], batch.snapshots
        self.new = [batch.num_new[s] for s in ranked]
        self.computed = [batch.num_computed[s] for s in ranked]
        firsts = [0]
        for new in batch.num_new:
            firsts.append(firsts[-1] + new)
        self.flat_first = [firsts[s] for s in ranked]
        # The sequence (by rank), the offset in it and the position of every packed row.
        self.sizes = list(_step_sizes(self.new))
        self.step_start = [0]
        for size in self.sizes:
            self.step_start.append(self.step_start[-1] + size)
        self.rank = [r for size in self.sizes for r in range(size)]
        self.offset = [j for j, size in enumerate(self.sizes) for _ in range(size)]
        self.position = [self.computed[r] + j for r, j in zip(self.rank, self.offset, strict=True)]

    def plan(self, views: Sequence[View]) -> StepPlan:
        rows = list(zip(self.rank, self.offset, strict=True))
        order = self._tensor([self.flat_first[r] + j for r, j in rows])
        last = self._tensor([self.step_start[new - 1] + r for r, new in enumerate(self.new)])
        kept_rows, kept_slots = self._kept(order, last)
        return StepPlan(
            sequences=self.ranked,
            order=order,
            positions=self._tensor(self.position),
            step_sizes=self.sizes,
            previous=self._tensor([self.step_start[j - 1] + r for r, j in rows if j > 0]),
            last=last,
            kept_rows=kept_rows,
            kept_slots=kept_slots,
            starts=self._rows_where([position == 0 for position in self.position]),
            reads=tuple(self._read_plan(view) for view in views),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _rows_where(self, holds: list[bool]) -> Tensor | None:
        return self._tensor([row for row, is_so in enumerate(holds) if is_so]) if any(holds) else None

    def _kept(self, order: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        if self.snapshots is None:
            return last, self.slots
        slots = self.snapshots[order]
        rows = (slots >= 0).nonzero().flatten()
        return torch.cat([last, rows]), torch.cat([self.slots, slots[rows]])

    def _read_plan(self, view: View) -> ReadPlan:
        tables = view.block_tables[self.ranked]
        completing = [row for row, position in enumerate(self.position) if position > 0]
        last = [computed + new - 1 for computed, new in zip(self.computed, self.new, strict=True)]
        # Whole blocks are read, from the one with the first pair that any token of the sequence sees.
        skipped = [view.first(computed) // self.block_size for computed in self.computed]
        num_pairs = [max(view.end(t) - n * self.block_size, 0) for t, n in zip(last, skipped, strict=True)]
        spans = list(_spans(self.new, num_pairs))
        is_decode = len(self.sizes) == 1
        return ReadPlan(
            completing=None if len(completing) == len(self.position) else self._tensor(completing),
            pairs=self._pair_rows(tables, completing),
            groups=[
                self._group(view, tables, skipped, range(a, b), max(num_pairs[a:b]), is_decode and len(spans) == 1)
                for a, b in spans
            ],
            unpad=None if is_decode else self._unpad(spans),
            blind=self._rows_where([view.end(position) == 0 for position in self.position]),
        )

    def _pair_rows(self, tables: Tensor, completing: list[int]) -> Tensor:
        pairs = self._tensor([self.position[row] - 1 for row in completing])
        block = tables[self._tensor([self.rank[row] for row in completing]), pairs // self.block_size]
        rows = (block[:, None] * len(self.heads) + self.heads) * self.block_size
        return (rows + (pairs % self.block_size)[:, None]).flatten()

    def _group(
        self, view: View, tables: Tensor, skipped: list[int], ranks: range, num_pairs: int, is_whole: bool
    ) -> ReadGroup:
        """The sequences of these ranks, of which the one with most pairs reads `num_pairs` after skipped blocks."""
        asked = self.new[ranks[0]]
        num_blocks = -(-num_pairs // self.block_size)
        skip = self._tensor([skipped[r] for r in ranks])[:, None]
        # A shorter sequence's table may end before: what is read there is masked.
        columns = (skip + torch.arange(num_blocks, device=self.device)).clamp(max=max(tables.shape[1] - 1, 0))
        blocks = tables[ranks[0] : ranks[-1] + 1].gather(1, columns)[:, None] * len(self.heads) + self.heads[:, None]
        offsets = [[min(j, self.new[r] - 1) for j in range(asked)] for r in ranks]
        rows = [self.step_start[j] + r for r, line in zip(ranks, offsets, strict=True) for j in line]
        # The row of a token that sees nothing is meaningless; `blind` lists it, to be replaced by zeros.
        seen = self._tensor([f(self.position[row]) for f in (view.first, view.end) for row in rows])
        first, end = seen.view(2, len(ranks), 1, asked, 1)
        pair = skip.view(-1, 1, 1, 1) * self.block_size
        pair = pair + torch.arange(num_blocks * self.block_size, device=self.device)
        hidden = (pair < first) | (pair >= end)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        queries = None if is_whole else self._tensor(rows).view(len(ranks), asked)
        return ReadGroup(queries, blocks.flatten(), mask)

    def _unpad(self, spans: list[tuple[int, int]]) -> Tensor:
        first_row: list[int] = []
        total = 0
        for a, b in spans:
            first_row += [total + i * self.new[a] for i in range(b - a)]
            total += (b - a) * self.new[a]
        return self._tensor([first_row[r] + j for r, j in zip(self.rank, self.offset, strict=True)])


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
