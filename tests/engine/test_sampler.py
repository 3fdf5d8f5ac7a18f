from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.bad_words import BadWords
from service.engine.grammar import Grammar, GrammarKind
from service.engine.request import SamplingParams
from service.engine.sampler import SamplingRow, sample, uniform
from tests.engine.naive_sampler import naive_sample

params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1e-9, 0.2, 0.6, 0.95, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice_index=st.integers(0, 5),
)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2**31), params_strategy, st.integers(0, 4096)), min_size=1, max_size=6),
    vocab=st.integers(1, 40),
)
def test_batched_equals_one_row_at_a_time(rows: list[tuple[int, SamplingParams, int]], vocab: int) -> None:
    logits = torch.stack(
        [torch.randn(vocab, generator=torch.Generator().manual_seed(s), dtype=torch.float64) * 4 for s, _, _ in rows]
    )
    expected = [naive_sample(logits[i].tolist(), params, position) for i, (_, params, position) in enumerate(rows)]
    assert sample(logits.clone(), [SamplingRow(params, position) for _, params, position in rows]) == expected
    # In float32, which the C++ library reads.
    logits = logits.float()
    expected = [naive_sample(logits[i].tolist(), params, position) for i, (_, params, position) in enumerate(rows)]
    assert sample(logits, [SamplingRow(params, position) for _, params, position in rows]) == expected


def test_ties_change_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0, 2.0, 1.0, 0.0]])
    for seed in range(60):
        params = SamplingParams(max_tokens=1, seed=seed, top_k=4, top_p=0.95)
        assert sample(logits.clone(), [SamplingRow(params, 0)]) == [naive_sample(logits[0].tolist(), params, 0)]


def test_ties_go_to_the_lower_id_and_top_k_keeps_exactly_k() -> None:
    logits = torch.zeros(1, 8)
    greedy = SamplingParams(max_tokens=1, temperature=0)
    assert sample(logits.clone(), [SamplingRow(greedy, 0)]) == [0]
    seen = {
        sample(logits.clone(), [SamplingRow(SamplingParams(max_tokens=1, top_k=3, seed=s), 0)])[0] for s in range(99)
    }
    assert seen == {0, 1, 2}


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p() -> None:
    logits = torch.zeros(1, 4)
    params = [SamplingParams(max_tokens=1, top_p=0.5, seed=seed) for seed in range(99)]
    assert {sample(logits.clone(), [SamplingRow(p, 0)])[0] for p in params} == {0, 1}


def test_typical_tokens_are_those_of_the_expected_information_not_the_likeliest() -> None:
    # Entropy 1.09 nats: the information of 0.3 is nearest to it, 1.2 nats, while that of 0.6 is 0.5.
    logits = torch.tensor([[0.6, 0.3, *[0.01] * 10]]).log()
    params = [SamplingParams(max_tokens=1, typical_p=0.29, seed=seed) for seed in range(50)]
    assert {sample(logits.clone(), [SamplingRow(p, 0)])[0] for p in params} == {1}
    params = [SamplingParams(max_tokens=1, typical_p=0.31, seed=seed) for seed in range(50)]
    assert {sample(logits.clone(), [SamplingRow(p, 0)])[0] for p in params} == {0, 1}


def test_banned_and_impossible_ids_are_never_drawn() -> None:
    logits = torch.tensor([[5.0, 1.0, -torch.inf, 0.0]])
    for seed in range(200):
        for temperature in (0.0, 3.0):
            params = SamplingParams(max_tokens=1, temperature=temperature, seed=seed)
            assert sample(logits.clone(), [SamplingRow(params, 0, banned_token_ids=(0,))])[0] in (1, 3)


def test_the_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    rows = [SamplingRow(SamplingParams(max_tokens=1, seed=7), position) for position in range(4000)]
    counts = Counter(sample(probabilities.log().repeat(4000, 1), rows))
    for i, p in enumerate(probabilities.tolist()):
        assert abs(counts[i] - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


def test_uniform_depends_on_every_argument_and_fills_the_unit_interval() -> None:
    draws = [uniform(seed, choice, position) for seed in range(20) for choice in range(10) for position in range(20)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    # Pinned: another value would change every sampled text between two releases.
    assert (uniform(0, 0, 0), uniform(7, 1, 3)) == (0.156742553465558, 0.5899433553244471)


# What makes more of the likeliest token than to draw it, beside what has no say where that is drawn.
CHANGING: dict[str, object] = {
    "temperature": 0.5,
    "min_tokens": 1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": ((1, 1.0),),
    "allowed_token_ids": (1,),
    "bad_words": BadWords((), 1),
    "num_logprobs": 0,
    "grammar": Grammar(GrammarKind.REGEX, "a"),
}
HARMLESS: dict[str, object] = {
    "max_tokens": 3,
    "top_k": 3,
    "top_p": 0.5,
    "typical_p": 0.5,
    "min_p": 0.5,
    "seed": 3,
    "choice_index": 3,
    "ignore_eos": True,
    "stop_token_ids": (3,),
    "logprob_token_ids": (3,),
    "num_prompt_logprobs": 3,
}


def test_plainly_greedy_is_what_nothing_else_is_asked_of() -> None:
    assert {field.name for field in fields(SamplingParams)} == CHANGING.keys() | HARMLESS.keys()
    greedy = SamplingParams(max_tokens=1, temperature=0)
    assert greedy.is_plainly_greedy
    for name, value in CHANGING.items():
        assert not replace(greedy, **{name: value}).is_plainly_greedy, name  # type: ignore[arg-type]
    for name, value in HARMLESS.items():
        assert replace(greedy, **{name: value}).is_plainly_greedy, name  # type: ignore[arg-type]
