"""The plan of a ragged batch: packed order, and groups of reads that waste little."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache import MemoryBatch, MemoryCache
from model.step_plan import StepPlan, View, plan_step
from tests.model.mosaics import small_config

sequences = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=12)


def plan_of(lengths: list[tuple[int, int]], block_size: int = 16) -> StepPlan:
    """Of sequences of (tokens computed, tokens new), each with blocks of its own."""
    width = 340 // block_size + 1
    cache = MemoryCache(small_config(), num_blocks=1, block_size=block_size, num_slots=1)
    tables = torch.arange(len(lengths) * width).view(len(lengths), width)
    computed, new = zip(*lengths, strict=True)
    return plan_step(
        MemoryBatch(cache, torch.arange(len(lengths)), tables, computed, new), 2, torch.float32, [View(tables)]
    )


@settings(max_examples=60, deadline=None)
@given(sequences)
def test_packed_order(lengths: list[tuple[int, int]]) -> None:
    plan = plan_of(lengths)
    flat = [(s, computed + j) for s, (computed, new) in enumerate(lengths) for j in range(new)]
    packed = [flat[i] for i in plan.order.tolist()]
    assert sorted(packed) == sorted(flat)
    assert sum(plan.step_sizes) == len(flat)
    num = len(lengths)
    for row, before in enumerate(plan.previous.tolist(), start=num):
        assert packed[before] == (packed[row][0], packed[row][1] - 1)
    ranked = plan.sequences.tolist()
    assert [packed[row] for row in plan.last.tolist()] == [(s, sum(lengths[s]) - 1) for s in ranked]
    assert [s for s, _ in packed[:num]] == ranked


@settings(max_examples=60, deadline=None)
@given(sequences, st.sampled_from([1, 5, 16]))
def test_every_token_reads_its_pairs_and_completes_one(lengths: list[tuple[int, int]], block_size: int) -> None:
    plan = plan_of(lengths, block_size)
    width = 340 // block_size + 1
    flat = [(s, computed + j) for s, (computed, new) in enumerate(lengths) for j in range(new)]
    packed = [flat[i] for i in plan.order.tolist()]
    completing = range(len(packed)) if plan.reads[0].completing is None else plan.reads[0].completing.tolist()
    # Pool row of pair p of sequence s for head h, by the cache's layout.
    stored = [
        (((s * width + (t - 1) // block_size) * 2 + h) * block_size + (t - 1) % block_size)
        for s, t in (packed[row] for row in completing)
        for h in range(2)
    ]
    assert plan.reads[0].pairs.tolist() == stored
    assert ([] if plan.starts is None else plan.starts.tolist()) == [r for r, (_, t) in enumerate(packed) if t == 0]
    visible: list[int] = []
    rows: list[int] = []
    for group in plan.reads[0].groups:
        seen = group.mask.eq(0).sum(-1).flatten().tolist()
        asked = list(range(len(packed))) if group.queries is None else group.queries.flatten().tolist()
        visible, rows = visible + seen, rows + asked
    places = range(len(packed)) if plan.reads[0].unpad is None else plan.reads[0].unpad.tolist()
    for row, place in enumerate(places):
        assert rows[place] == row
        _, position = packed[row]
        assert visible[place] == position or position == 0


def test_a_long_sequence_does_not_pad_short_ones() -> None:
    plan = plan_of([(300, 1)] + [(2, 1)] * 11)
    assert [group.mask.shape for group in plan.reads[0].groups] != [(12, 1, 1, 304)]
    assert sum(group.mask.numel() for group in plan.reads[0].groups) < 1000


def test_sequences_of_like_length_are_read_at_once() -> None:
    assert len(plan_of([(100 + i, 1) for i in range(12)]).reads[0].groups) == 1
    assert len(plan_of([(0, 20)] * 12).reads[0].groups) == 1
    assert len(plan_of([(0, 40)] + [(200, 1)] * 11).reads[0].groups) == 2
