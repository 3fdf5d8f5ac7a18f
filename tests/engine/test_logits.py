from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.bad_words import END, START, BadWords
from service.engine.logits import adjust, penalise, token_logprobs
from service.engine.request import SamplingParams
from service.engine.token_counts import TokenCounts

VOCAB = 8


def spelled(*words: tuple[int, ...]) -> BadWords | None:
    """These runs of tokens as an automaton: a node for each beginning of a word."""
    nodes = {beginning: n for n, beginning in enumerate(dict.fromkeys(w[:i] for w in ((), *words) for i in range(9)))}
    edges = {
        (nodes[word[:i]], word[i], nodes[word[: i + 1]] if i + 1 < len(word) else END)
        for word in words
        for i in range(len(word))
    }
    return BadWords(tuple(sorted(edges)), max(map(len, words))) if words else None


def words_of(bad: BadWords | None) -> set[tuple[int, ...]]:
    """Every run of tokens from the start of an automaton to its end."""
    found, paths = set(), [((), START)]
    while bad and paths:
        word, node = paths.pop()
        for start, token_id, then in bad.edges:
            if start == node and then == END:
                found.add((*word, token_id))
            elif start == node:
                paths.append(((*word, token_id), then))
    return found


short = st.lists(st.integers(0, 2), max_size=6).map(tuple)


@settings(max_examples=200)
@given(st.lists(short.filter(bool), min_size=1, max_size=3), short, short)
def test_a_word_is_found_however_short_the_prompt(
    words: list[tuple[int, ...]], prompt: tuple[int, ...], output: tuple[int, ...]
) -> None:
    bad, text = spelled(*words), (*prompt, *output)
    assert bad is not None
    expected = {
        word[-1] for word in words if text[len(text) - len(word) + 1 :] == word[:-1] and len(text) >= len(word) - 1
    }
    assert set(bad.completing(prompt, output)) == expected


ids = st.integers(0, VOCAB + 1)  # two of them beyond the row
params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -2.0]),
    logit_bias=st.lists(st.tuples(ids, st.sampled_from([-100.0, 1.0])), max_size=3).map(tuple),
    allowed_token_ids=st.none() | st.lists(ids, min_size=1, max_size=4).map(tuple),
    bad_words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=3).map(
        lambda words: spelled(*words)
    ),
)
tokens = st.lists(st.integers(0, 3), max_size=6)


def plainly(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], banned: list[int]
) -> list[float]:
    """The same, token by token from the definition."""
    text = prompt + output
    allowed = set(range(VOCAB))
    if params.allowed_token_ids is not None:
        allowed = allowed & set(params.allowed_token_ids) or allowed
    ends_bad_word = {
        word[-1]
        for word in words_of(params.bad_words)
        if len(text) >= len(word) - 1 and text[len(text) - len(word) + 1 :] == list(word[:-1])
    }
    allowed = allowed - ends_bad_word - set(banned) or allowed
    result = []
    for i, logit in enumerate(logits):
        if i not in allowed:
            logit = -math.inf
        logit += sum(bias for token_id, bias in params.logit_bias if token_id == i)
        if i in text:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.presence_penalty * (i in output) + params.frequency_penalty * output.count(i)
        result.append(logit)
    return result


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5), min_size=VOCAB, max_size=VOCAB),
    params=params_strategy,
    prompt=tokens,
    output=tokens,
    banned=st.lists(ids, max_size=2),
)
def test_adjusting_equals_its_definition(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], banned: list[int]
) -> None:
    row = torch.tensor(logits, dtype=torch.float64)
    adjust(row, params, prompt, output, banned)
    counts = TokenCounts(prompt, ())
    for token_id in output:
        counts.add(token_id)
    # Beside a row that is not asked about, and one of another text.
    rows = torch.stack([row, row, torch.zeros(VOCAB, dtype=torch.float64)])
    penalise(rows, {2: params, 0: params}, {0: counts, 2: TokenCounts(output, prompt)})
    assert rows[1].tolist() == row.tolist()
    row = rows[0]
    assert row.tolist() == pytest.approx(plainly(logits, params, prompt, output, banned))


def test_there_is_always_something_to_draw() -> None:
    params = SamplingParams(max_tokens=1, allowed_token_ids=(2, 3), bad_words=spelled((2,), (3,)))
    row = torch.zeros(VOCAB)
    adjust(row, params, [], [], [])
    assert (row > -math.inf).nonzero().flatten().tolist() == [2, 3]
    row = torch.zeros(2)
    adjust(row, SamplingParams(max_tokens=1), [], [], [0, 1])
    assert row.tolist() == [0, 0]


def test_what_comes_with_no_chance_keeps_none_and_the_rest_can_be_drawn() -> None:
    for params, banned in (
        (SamplingParams(max_tokens=1, allowed_token_ids=(0, 1)), ()),
        (SamplingParams(max_tokens=1), (2, 3)),
        (SamplingParams(max_tokens=1, allowed_token_ids=(1, 2)), (2,)),
        (SamplingParams(max_tokens=1, logit_bias=((0, 100.0),), repetition_penalty=2.0), (3,)),
    ):
        row = torch.tensor([-math.inf, -math.inf, 1.0, 2.0])
        adjust(row, params, [0, 1], [1], banned)
        drawable = (row > -math.inf).nonzero().flatten().tolist()
        assert drawable
        assert set(drawable) <= {2, 3}


def test_log_probabilities_ranks_and_alternatives() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    first, second = token_logprobs(logits, [2, 3], 2)
    total = math.log(1 + math.exp(2) + math.e + math.exp(2))
    assert (first.token_id, first.rank) == (2, 3)
    assert first.logprob == pytest.approx(1 - total)
    assert [i for i, _ in first.top] == [1, 3]
    assert [p for _, p in first.top] == pytest.approx([2 - total] * 2)
    assert (second.rank, [i for i, _ in second.top]) == (4, [0, 1]), "ties go to the lower id"
    assert token_logprobs(logits, [0, 0], 0)[0].top == ()
    assert token_logprobs(logits[:0], [], 3) == ()


def test_log_probabilities_of_the_tokens_asked_for() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    first, second = token_logprobs(logits, [1, 0], 1, {0: (2, 7, 0)})
    assert [i for i, _ in first.top] == [2, 7, 0]
    total = math.log(1 + math.exp(2) + math.e)
    assert [p for _, p in first.top] == pytest.approx([1 - total, -math.inf, -total])
    assert [i for i, _ in second.top] == [0], "the others get the likeliest as before"


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4),
    num_top=st.integers(1, 12),
)
def test_the_likeliest_are_those_of_a_whole_sort_however_many_tie(rows: list[list[int]], num_top: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    for row, told in zip(rows, token_logprobs(logits, [3] * len(rows), num_top), strict=True):
        order = sorted(range(9), key=lambda i: (-row[i], i))
        assert [i for i, _ in told.top] == order[:num_top]
        assert told.rank == order.index(3) + 1
