"""The pool that blocks are swapped into: what can come back, and when."""

from __future__ import annotations

from service.engine.swap_pool import Swap, SwapPool


def test_what_was_sent_can_come_back_from_the_next_step_on_and_stays() -> None:
    pool = SwapPool(2)
    pool.send(b"a", block=5, slot=15)
    assert pool.place_of(b"a") is None, "it is still where it was"
    assert pool.take() == ((Swap(5, 15, 0),), ())
    for block in (7, 8):
        place = pool.place_of(b"a")
        assert place == 0
        pool.bring_back(place, block, block + 10)
    assert pool.take() == ((), (Swap(7, 17, 0), Swap(8, 18, 0)))
    pool.send(b"a", block=7, slot=17)
    assert pool.take() == ((), ()), "it is here already"
    assert (pool.num_outs, pool.num_ins, pool.num_blocks) == (1, 2, 1)


def test_the_one_sent_least_recently_makes_room() -> None:
    pool = SwapPool(2)
    for block, key in enumerate((b"a", b"b", b"a", b"c")):
        pool.send(key, block, block)
        pool.take()
        pool.check_integrity()
    assert [pool.place_of(key) for key in (b"a", b"b", b"c")] == [0, None, 1]


def test_what_comes_back_may_be_overwritten_in_the_same_step() -> None:
    pool = SwapPool(1)
    pool.send(b"a", 1, 11)
    pool.take()
    place = pool.place_of(b"a")
    pool.send(b"b", 2, 12)
    assert place is not None
    pool.bring_back(place, 2, 12)
    assert pool.take() == ((Swap(2, 12, 0),), (Swap(2, 12, 0),))
    assert pool.place_of(b"a") is None
    assert pool.place_of(b"b") == 0


def test_a_block_given_away_before_its_content_came_is_not_written_to() -> None:
    pool = SwapPool(1)
    pool.send(b"a", 1, 11)
    pool.take()
    pool.bring_back(0, 3, 13)
    pool.send(b"a", 3, 13)
    assert pool.take() == ((), ())


def test_without_places_nothing_is_kept() -> None:
    pool = SwapPool(0)
    pool.send(b"a", 1, 1)
    assert pool.take() == ((), ())
    assert pool.num_blocks == 0
