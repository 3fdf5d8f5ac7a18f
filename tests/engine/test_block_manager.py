from __future__ import annotations

import pytest

from service.engine.block_manager import BlockManager
from service.engine.prefix_cache import CachedPrefix
from service.engine.sequence import Sequence
from tests.engine.scripted import make_request


def make_sequence(num_tokens: int = 3) -> Sequence:
    return Sequence(make_request("a", tuple(range(num_tokens))), 0.0)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_n_tokens_have_n_minus_1_pairs(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(8, 4, 1).num_blocks_for(num_tokens) == num_blocks


def test_growing_takes_what_is_missing_and_release_gives_all_back() -> None:
    manager = BlockManager(4, 4, 2)
    sequence = make_sequence()
    manager.take_slot(sequence)
    manager.grow(sequence, 6)
    manager.grow(sequence, 7)
    assert len(sequence.block_table) == 2
    assert (manager.num_free_blocks, manager.num_free_slots) == (2, 1)
    manager.check_integrity([sequence])
    manager.release(sequence)
    manager.release(sequence)
    assert (manager.num_free_blocks, manager.num_free_slots) == (4, 2)
    manager.check_integrity([])


def test_can_grow_counts_blocks_and_reserve() -> None:
    manager = BlockManager(3, 4, 2)
    sequence = make_sequence()
    assert manager.can_grow(sequence, 13)
    assert not manager.can_grow(sequence, 14)
    sequence = make_sequence(9)
    assert manager.can_begin(sequence, CachedPrefix(), reserve=1)
    assert not manager.can_begin(sequence, CachedPrefix(), reserve=2)


def test_integrity_sees_a_leak_and_a_double_owner() -> None:
    manager = BlockManager(4, 4, 1)
    first, second = make_sequence(), make_sequence()
    manager.grow(first, 6)
    with pytest.raises(AssertionError, match="miscounted"):
        manager.check_integrity([])
    second.block_table = list(first.block_table)
    with pytest.raises(AssertionError, match="miscounted"):
        manager.check_integrity([first, second])
    manager.check_integrity([first])
    manager.take_slot(first)
    first.slot = None
    with pytest.raises(AssertionError, match="slot"):
        manager.check_integrity([first])
