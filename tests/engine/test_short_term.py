"""The blocks of a short-term memory: bounded to the window, shared while in memory, never missed by what goes on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.engine import Engine
from service.engine.request import Request
from service.engine.sequence import Sequence
from service.engine.short_term import ShortTermBlocks, short_blocks_of_window
from tests.engine.scripted import ScriptedRunner, make_engine, make_request, make_scheduler, run

SIZE = 4  # pairs in a block


def make(name: str, length: int, max_tokens: int = 1, first: int = 1) -> Request:
    return make_request(name, tuple(1 + (first + 7 * i) % 49 for i in range(length)), max_tokens, ignore_eos=True)


def blocks_of(engine: Engine) -> ShortTermBlocks:
    short_term = engine.scheduler.blocks.short_term
    assert short_term is not None
    return short_term


@pytest.mark.parametrize("window", [1, 3, 4, 5, 11])
def test_a_long_text_never_holds_more_than_its_window(window: int) -> None:
    engine = make_engine(make_scheduler(num_blocks=100, max_model_len=400, window=window, has_prefix_cache=False))
    engine.add_request(make("a", 3, max_tokens=300))
    most = 0
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
        for sequence in engine.scheduler.running:
            most = max(most, sum(block is not None for block in sequence.short_table))
    assert most <= short_blocks_of_window(window, SIZE)
    assert most >= window / SIZE


def test_a_prompt_in_chunks_holds_its_window_between_them() -> None:
    engine = make_engine(make_scheduler(num_blocks=100, max_model_len=400, window=9, max_num_batched_tokens=16))
    engine.add_request(make("a", 300))
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            held = [m for m, block in enumerate(sequence.short_table) if block is not None]
            assert held == list(range((sequence.num_computed_tokens - 9) // SIZE, len(sequence.short_table)))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 11), st.integers(0, 2)), min_size=1, max_size=8),
    window=st.integers(1, 20),
    block_size=st.sampled_from([1, 4, 31]),
    max_num_seqs=st.integers(1, 4),
    extra_budget=st.integers(0, 30),
    has_prefix_cache=st.booleans(),
)
def test_what_is_promised_to_suffice_suffices(
    lengths: list[tuple[int, int, int]],
    window: int,
    block_size: int,
    max_num_seqs: int,
    extra_budget: int,
    has_prefix_cache: bool,
) -> None:
    scheduler = make_scheduler(
        num_blocks=40,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_budget,
        has_prefix_cache=has_prefix_cache,
        window=window,
    )
    engine = make_engine(scheduler)
    run(engine, *(make(f"r{i}", length, tokens, first) for i, (length, tokens, first) in enumerate(lengths)))
    scheduler.blocks.check_integrity([])


def test_the_same_prompt_again_shares_the_window() -> None:
    engine = make_engine(make_scheduler(num_blocks=40, window=6, max_model_len=60))
    run(engine, make("a", 32))
    prefix = engine.scheduler.blocks.find(Sequence(make("b", 32), 0.0))
    assert prefix.num_tokens == 31
    # Before the window nothing is needed, in it everything is there, and the block that is not whole is a tail.
    assert [block is not None for block in prefix.short_table] == [False] * 6 + [True]
    assert prefix.short_tail is not None
    assert run(engine, make("b", 32, max_tokens=9))["b"][0].num_cached_tokens == 31


def test_a_text_whose_window_was_forgotten_is_found_as_far_as_its_window_is_there() -> None:
    # A second text of other words drives out the first one's short-term blocks, but not the others.
    engine = make_engine(make_scheduler(num_blocks=100, window=6, max_model_len=60, max_num_seqs=1))
    run(engine, make("a", 30))
    found = engine.scheduler.blocks.find(Sequence(make("x", 30), 0.0)).num_tokens
    run(engine, make("b", 50, first=2))
    assert engine.scheduler.blocks.prefix_cache.find(Sequence(make("x", 30), 0.0)).num_tokens == found == 29
    assert engine.scheduler.blocks.find(Sequence(make("x", 30), 0.0)).num_tokens == 0
    # It is absorbed again, and found again afterwards, though the long-term blocks had been there all the time.
    assert run(engine, make("c", 30))["c"][0].num_cached_tokens == 0
    assert run(engine, make("d", 30))["d"][0].num_cached_tokens == 29


def test_with_a_window_of_one_pair_a_whole_block_needs_nothing() -> None:
    engine = make_engine(make_scheduler(num_blocks=100, window=1, max_model_len=60, max_num_seqs=1))
    run(engine, make("a", 30))
    prompt = make("a", 30).prompt_token_ids[:29]
    prefix = engine.scheduler.blocks.find(Sequence(make_request("b", (*prompt, 49, 49), 1), 0.0))
    assert prefix.num_tokens == 29
    assert prefix.short_table == (None,) * 7
    assert prefix.short_tail is None


def test_a_block_let_go_is_missed() -> None:
    """The scripted runner sees a plan that lets go of a block too early."""
    engine = make_engine(make_scheduler(window=6))
    short_term = blocks_of(engine)
    engine.add_request(make("a", 20, max_tokens=8))
    engine.step()
    short_term.window = 2
    assert isinstance(engine.runner, ScriptedRunner)
    engine.step()
    with pytest.raises(AssertionError, match="let go"):
        engine.step()
