"""What is found again of a text, what it saves, and what is forgotten first. The runner checks what lies in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.engine.engine import Engine
from service.engine.prefix_cache import CachedPrefix, PrefixCache, StateSnapshot
from service.engine.prefix_keys import PrefixKeys
from service.engine.request import Request, RequestOutput
from service.engine.sequence import Sequence
from tests.engine.scripted import ScriptedRunner, continuation, make_engine, make_request, make_scheduler, run

SIZE = 4  # pairs in a block


def prompt_of(*lengths: int) -> tuple[int, ...]:
    """A part of so many tokens, then another, ...; equal lengths in the same place give equal parts."""
    return tuple(1 + (place * 17 + length * 5 + i) % 49 for place, length in enumerate(lengths) for i in range(length))


def cached(outputs: list[RequestOutput]) -> int:
    """What a request was told was cached: with its first output alone."""
    assert not any(output.num_cached_tokens for output in outputs[1:])
    return outputs[0].num_cached_tokens


def computed(engine: Engine) -> dict[str, int]:
    assert isinstance(engine.runner, ScriptedRunner)
    return dict(engine.runner.num_computed)


def make(name: str, prompt: tuple[int, ...], max_tokens: int = 2, *, salt: str = "", **sampling: object) -> Request:
    request = make_request(name, prompt, max_tokens, **({"ignore_eos": True} | sampling))
    return replace(request, cache_salt=salt)


@pytest.mark.parametrize("length", [1, 2, 3, SIZE, SIZE + 1, SIZE + 2, 2 * SIZE + 1, 2 * SIZE + 2, 13])
def test_the_same_prompt_again_costs_one_token(length: int) -> None:
    engine = make_engine()
    assert cached(run(engine, make("a", prompt_of(length)))["a"]) == 0
    # One token is left to predict from. The state after one token has no pair to go with it and is not kept.
    expected = length - 1 if length > 2 else 0
    assert cached(run(engine, make("b", prompt_of(length)))["b"]) == expected
    assert computed(engine)["b"] == length + 1 - expected


@pytest.mark.parametrize(
    ("shared", "found"), [(SIZE, 0), (SIZE + 1, SIZE + 1), (2 * SIZE, SIZE + 1), (2 * SIZE + 1, 2 * SIZE + 1)]
)
def test_a_block_is_shared_only_with_the_token_that_completes_it(shared: int, found: int) -> None:
    """Pair t holds what token t + 1 is: two texts that are equal up to token t alone do not share it."""
    engine = make_engine()
    run(engine, make("a", prompt_of(shared, 6)))
    assert cached(run(engine, make("b", prompt_of(shared, 7)))["b"]) == found


@pytest.mark.parametrize("shared", [2, 3, SIZE, SIZE + 3, 2 * SIZE, 2 * SIZE + 4])
def test_a_third_text_goes_on_from_where_the_second_parted_from_the_first(shared: int) -> None:
    engine = make_engine()
    lengths = (6, 7, 8, 9, 6)  # after the part that is shared; the last is the first again
    told = [cached(run(engine, make(f"r{i}", prompt_of(shared, n)))[f"r{i}"]) for i, n in enumerate(lengths)]
    assert told == [0, (shared - 1) // SIZE * SIZE + (shared > SIZE), shared, shared, shared + 5]


def test_texts_part_in_more_than_one_place() -> None:
    engine = make_engine()
    stem = prompt_of(2 * SIZE + 4)
    prompts = [(*stem[:n], 30 + i, 40 + i, 1, 2, 3, 4) for i, n in enumerate((12, 12, 12, 10, 10, 12, 11))]
    told = [cached(run(engine, make(f"r{i}", prompt, max_tokens=1))[f"r{i}"]) for i, prompt in enumerate(prompts)]
    # What leaves the second's way earlier is a place of its own; each later one takes the longest that it can.
    assert told == [0, 9, 12, 9, 10, 12, 10]


def test_texts_that_have_little_in_common_within_a_block_keep_no_state_of_it() -> None:
    cache = PrefixCache(8, 32, 4)
    first, second = (
        Sequence(make(name, (*range(1, 8), *rest)), 0.0) for name, rest in (("a", range(60)), ("b", (99, 98, 97)))
    )
    first.block_table += [0, 1]
    cache.book(first, (StateSnapshot(33, 4),))
    assert cache.find(second) == CachedPrefix()
    third = Sequence(make("c", (*range(1, 8), 0, 97)), 0.0)
    assert cache.find(third) == CachedPrefix()
    fourth = Sequence(make("d", (*range(1, 8), 0, 97, 96)), 0.0)
    assert cache.find(fourth) == CachedPrefix(branch_point=8)


def test_many_part_at_once_where_there_are_few_slots() -> None:
    engine = make_engine(make_scheduler(num_blocks=60, max_num_seqs=3, max_num_batched_tokens=64))
    run(engine, make("a", prompt_of(7, 9)))
    outputs = run(engine, *(make(f"r{i}", prompt_of(7, 10 + i)) for i in range(3)))
    assert [cached(outputs[f"r{i}"]) for i in range(3)] == [5, 5, 5]
    engine.scheduler.check_integrity()
    assert cached(run(engine, make("b", prompt_of(7, 20)))["b"]) in (5, 7)


def test_a_conversation_goes_on_from_what_was_generated() -> None:
    engine = make_engine()
    first = make("a", prompt_of(6), max_tokens=8)
    run(engine, first)
    answered = (*first.prompt_token_ids, *continuation(first))
    assert cached(run(engine, make("b", (*answered, 7, 8, 9)))["b"]) == 13  # of 14; the last was never absorbed
    assert cached(run(engine, make("c", answered))["c"]) == 13


def test_another_salt_shares_nothing() -> None:
    engine = make_engine()
    for salt in ("", "a", "b"):
        assert cached(run(engine, make(f"{salt}1", prompt_of(12), salt=salt))[f"{salt}1"]) == 0
    for salt in ("", "a", "b"):
        assert cached(run(engine, make(f"{salt}2", prompt_of(12), salt=salt))[f"{salt}2"]) == 11


def test_choices_of_one_prompt_absorb_it_once() -> None:
    engine = make_engine(make_scheduler(num_blocks=40, max_num_seqs=5, max_num_batched_tokens=16))
    requests = [make(f"r{i}", prompt_of(27), max_tokens=5) for i in range(5)]
    outputs = run(engine, *requests)
    assert [cached(outputs[r.request_id]) for r in requests] == [0, 26, 26, 26, 26]
    assert list(computed(engine).values()) == [31, 5, 5, 5, 5]


def test_choices_hold_the_blocks_of_their_prompt_together() -> None:
    engine = make_engine(make_scheduler(num_blocks=14, max_num_seqs=4, max_num_batched_tokens=32))
    for i in range(4):
        engine.add_request(make(f"r{i}", prompt_of(27), max_tokens=5))
    for _ in range(3):
        engine.step()
    # Six whole blocks once, and a seventh for each.
    assert [len(s.block_table) for s in engine.scheduler.running] == [7] * 4
    assert engine.scheduler.blocks.num_free_blocks == 14 - 10
    assert engine.scheduler.num_preemptions == 0


def test_who_was_waited_for_may_go() -> None:
    engine = make_engine(make_scheduler(num_blocks=40, max_num_batched_tokens=8))
    for name in "abc":
        engine.add_request(make(name, prompt_of(27)))
    engine.step()
    engine.abort("a")
    outputs = run(engine, make("d", prompt_of(27)))
    assert cached(outputs["d"]) == 26
    # One block was complete; the next in line went on from there, and the others waited for it.
    assert computed(engine) == {"a": 8, "b": 27 + 1 - 5, "c": 2, "d": 2}


def test_who_holds_back_goes_on_holding_back_while_there_is_more_to_come() -> None:
    engine = make_engine(make_scheduler(num_blocks=40, max_num_batched_tokens=64))
    run(engine, make("a", prompt_of(11)), make("b", prompt_of(11, 9)), make("c", prompt_of(11, 9)))
    # The second goes on from where the first was before its last token.
    assert computed(engine) == {"a": 12, "b": 20 + 1 - 10, "c": 2}


def test_others_go_ahead_meanwhile() -> None:
    engine = make_engine(make_scheduler(num_blocks=40, max_num_batched_tokens=16))
    for request in (make("a", prompt_of(27)), make("b", prompt_of(27)), make("other", prompt_of(3))):
        engine.add_request(request)
    produced = [[output.request_id for output in engine.step()] for _ in range(3)]
    assert produced == [[], ["a", "other"], ["a", "other", "b"]]


def test_one_who_asks_about_its_prompt_absorbs_all_of_it_and_leaves_it_behind() -> None:
    engine = make_engine()
    for name in "ab":
        assert cached(run(engine, make(name, prompt_of(14), num_prompt_logprobs=0))[name]) == 0
        assert computed(engine)[name] == 15
    assert cached(run(engine, make("c", prompt_of(14)))["c"]) == 13


def test_the_least_recently_used_goes_first_and_the_end_of_a_text_before_its_beginning() -> None:
    engine = make_engine(make_scheduler(num_blocks=8))
    run(engine, make("a", prompt_of(13), max_tokens=1))
    run(engine, make("b", prompt_of(14), max_tokens=1))
    blocks = engine.scheduler.blocks
    assert (blocks.num_free_blocks, blocks.prefix_cache.num_idle_blocks) == (8, 6)
    run(engine, make("a again", prompt_of(13), max_tokens=1))
    # Two are free, two more must go: those at the end of b.
    run(engine, make("c", prompt_of(15), max_tokens=1))
    assert blocks.prefix_cache.num_evictions == 2
    found = [blocks.prefix_cache.find(Sequence(make("x", prompt_of(n)), 0.0)).num_tokens for n in (13, 14, 15)]
    assert found == [12, 5, 14]


def test_a_preempted_sequence_absorbs_again_only_what_was_evicted() -> None:
    engine = make_engine(make_scheduler(num_blocks=9, max_num_seqs=2, max_num_batched_tokens=32))
    requests = [make("a", prompt_of(15), max_tokens=16), make("b", prompt_of(16), max_tokens=14)]
    outputs = run(engine, *requests)
    assert engine.scheduler.num_preemptions == 1
    assert computed(engine)["a"] == 30
    lost = computed(engine)["b"] - 29
    assert 0 < lost <= 16
    assert cached(outputs["b"]) == 0, "what it finds again it had absorbed itself"


def test_with_room_to_swap_a_preempted_sequence_absorbs_again_less_than_a_block() -> None:
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=2, max_num_batched_tokens=32, num_swap_blocks=9)
    engine = make_engine(scheduler)
    run(engine, make("a", prompt_of(15), max_tokens=16), make("b", prompt_of(16), max_tokens=14))
    assert scheduler.num_preemptions == 1
    assert computed(engine)["a"] == 30
    assert 0 < computed(engine)["b"] - 29 <= SIZE
    pool = scheduler.blocks.swap_pool
    assert 0 < pool.num_ins <= pool.num_outs


def test_what_was_evicted_comes_back_from_the_swap_pool_until_that_is_full_too() -> None:
    scheduler = make_scheduler(num_blocks=8, num_swap_blocks=6)
    engine = make_engine(scheduler)
    for name, length in (("a", 13), ("b", 14), ("c", 15), ("d", 16)):
        run(engine, make(name, prompt_of(length), max_tokens=1))
    # Four texts of three complete blocks each, of which eight fit into memory and six beside it.
    found = {n: cached(run(engine, make(f"{n}", prompt_of(n), max_tokens=1))[f"{n}"]) for n in (14, 15, 16, 13)}
    assert found[15] >= 13
    assert found[16] >= 13
    assert found[13] < 13
    assert scheduler.blocks.swap_pool.num_blocks <= 6


def test_what_was_absorbed_before_a_preemption_is_not_called_cached() -> None:
    engine = make_engine(make_scheduler(num_blocks=8, max_num_seqs=2, max_num_batched_tokens=2))
    outputs = run(engine, make("a", prompt_of(13), max_tokens=12), make("b", prompt_of(17)))
    assert engine.scheduler.num_preemptions == 1
    assert computed(engine)["b"] < 18 + 6, "it found its first block again"
    assert cached(outputs["b"]) == 0


def test_counts() -> None:
    engine = make_engine()
    for name in "ab":
        run(engine, make(name, prompt_of(15)))
    cache = engine.scheduler.blocks.prefix_cache
    assert (cache.num_queried_tokens, cache.num_hit_tokens, cache.num_evictions) == (30, 14, 0)
    # Three whole blocks, and the state before the last token of the prompt, which lies within the fourth.
    assert (cache.num_cached_blocks, cache.num_idle_blocks, cache.num_snapshots) == (3, 4, 4)


def test_without_it_nothing_is_kept_and_nobody_waits() -> None:
    engine = make_engine(make_scheduler(has_prefix_cache=False))
    requests = [make(name, prompt_of(14)) for name in "abc"]
    outputs = run(engine, *requests)
    assert [cached(outputs[name]) for name in "abc"] == [0, 0, 0]
    assert computed(engine) == dict.fromkeys("abc", 15)
    cache = engine.scheduler.blocks.prefix_cache
    assert (cache.num_slots, cache.num_snapshots, cache.num_idle_blocks) == (0, 0, 0)


def test_hashes_tell_all_texts_apart() -> None:
    keys_of = PrefixKeys(2, 1)
    seen: dict[bytes, tuple[object, ...]] = {}
    for salt in ("", "a"):
        for length in range(8):
            for number in range(2**length):
                tokens = tuple(number >> i & 1 for i in range(length))
                sequence = Sequence(make("x", (*tokens, 0), salt=salt), 0.0)
                keys = [*keys_of.of_blocks(sequence, length), keys_of.of_tail(sequence, length)]
                ends = [3 + 2 * m for m in range(len(keys) - 1)] + [length]
                for key, end in zip(keys, ends, strict=True):
                    if key is not None:
                        assert seen.setdefault(key, (salt, *tokens[:end])) == (salt, *tokens[:end])
    assert len(seen) == len(set(seen.values()))


def test_more_prompts_than_snapshots_of_their_ends() -> None:
    engine = make_engine(make_scheduler(num_blocks=30, max_num_seqs=2))
    for i in range(6):
        run(engine, make(f"r{i}", prompt_of(3 + i, 5), max_tokens=1))
    told = {i: cached(run(engine, make(f"s{i}", prompt_of(3 + i, 5), max_tokens=1))[f"s{i}"]) for i in (5, 4, 0)}
    assert told == {5: 12, 4: 11, 0: 5}, "the oldest has its whole blocks alone"
