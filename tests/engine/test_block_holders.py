"""The map of memory blocks: kept up to date piece by piece, and yet what a walk over all holders would find."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.block_holders import FIRST_OWNER, FREE, IDLE, SHARED, BlockHolders
from service.engine.sequence import Sequence
from tests.engine.scripted import make_engine, make_request, make_scheduler, run

NUM_BLOCKS = 4


def holder(slot: int) -> Sequence:
    sequence = Sequence(make_request(f"r{slot}"), 0.0)
    sequence.slot = slot
    return sequence


def test_a_block_is_nobodys_then_somebodys_then_shared_and_back() -> None:
    holders, first, second = BlockHolders(2), holder(5), holder(7)
    states = [holders.map()[0]]
    for change in (
        lambda: holders.add(0, first),
        lambda: holders.add(0, second),
        lambda: holders.remove(0, first),
        lambda: holders.remove(0, second),
        lambda: holders.rest(0),
    ):
        change()
        states.append(holders.map()[0])
    assert states == [FREE, FIRST_OWNER + 5, SHARED, FIRST_OWNER + 7, FREE, IDLE]
    assert holders.map()[1] == FREE


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, NUM_BLOCKS - 1)), max_size=40))
def test_the_map_is_what_a_walk_finds(changes: list[tuple[int, int]]) -> None:
    """Each change takes or lets go; the slots of the first two differ, and look alike modulo 250."""
    holders, sequences = BlockHolders(NUM_BLOCKS), [holder(3), holder(253), holder(9)]
    for number, block in changes:
        table = sequences[number].block_table
        if block in table:
            table.remove(block)
            assert holders.remove(block, sequences[number]) == any(block in s.block_table for s in sequences)
        else:
            table.append(block)
            holders.add(block, sequences[number])
        holders.check_integrity(sequences, ())
        assert holders.counts == [sum(b in s.block_table for s in sequences) for b in range(NUM_BLOCKS)]


def test_what_comes_back_from_the_swap_pool_and_is_not_begun_with_is_idle() -> None:
    engine = make_engine(make_scheduler(num_blocks=13, num_swap_blocks=8))
    prompts = [tuple(range(first, first + 17)) for first in range(3)]
    for number, prompt in enumerate(prompts):
        run(engine, make_request(f"r{number}", prompt, 1, ignore_eos=True))
    run(engine, make_request("long", (7,) * 28, 4, ignore_eos=True))  # drives others out, then leaves a block free
    blocks = engine.scheduler.blocks
    found = blocks.find(Sequence(make_request("again", prompts[0]), 0.0))
    assert found.blocks
    blocks.check_integrity([])
    assert {blocks.map()[block] for block in found.blocks} == {IDLE}
