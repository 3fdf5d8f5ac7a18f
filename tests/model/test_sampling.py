"""The C++ library draws and scores as plain torch does, to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import cpu_sampling, sampling
from model.kernels.cpu_library import library
from model.kernels.sampling import Draws

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels were not built")

NAN, INF = math.nan, math.inf


@st.composite
def logit_rows(draw: st.DrawFn) -> Tensor:
    """Rows of all sizes around a block of sums, smooth or full of ties, with what no network should give in places."""
    num_rows, vocab = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7, 8, 9, 255, 256, 257, 700]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(num_rows, vocab, generator=generator) * draw(st.sampled_from([0.01, 1.0, 4.0, 40.0]))
    if draw(st.booleans()):
        logits = logits.round()
    for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, -0.0]), max_size=3)):
        logits[draw(st.integers(0, num_rows - 1)), draw(st.integers(0, vocab - 1)) :: draw(st.integers(1, 9))] = value
    # As the engine hands them over: a part of each row of a wider tensor.
    return torch.cat([logits, torch.full((num_rows, 3), 1e9)], dim=1)[:, :vocab]


one_draw = st.tuples(
    st.integers(0, 4),
    st.sampled_from([1e-300, 0.1, 0.7, 1.0, 30.0]),
    st.sampled_from([0, 1, 2, 5, 40, 10_000]),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1 - 2**-53, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0.0, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
)


def draws_of(chosen: list[tuple[int, float, int, float, float, float]], num_rows: int) -> Draws:
    rows, temperature, top_k, top_p, min_p, u = (list(column) for column in zip(*chosen, strict=True))
    return Draws([row % num_rows for row in rows], temperature, top_k, [1.0] * len(rows), top_p, min_p, u)


@settings(max_examples=400, deadline=None)
@given(logits=logit_rows(), chosen=st.lists(one_draw, min_size=1, max_size=6))
def test_the_same_tokens_are_drawn(logits: Tensor, chosen: list[tuple[int, float, int, float, float, float]]) -> None:
    draws = draws_of(chosen, len(logits))
    assert cpu_sampling.draw(logits, draws) == sampling.draw(logits, draws)
    assert cpu_sampling.argmax(logits) == sampling.argmax(logits)


@settings(max_examples=200, deadline=None)
@given(logits=logit_rows(), data=st.data())
def test_the_same_scores_are_told(logits: Tensor, data: st.DataObject) -> None:
    logits = logits.nan_to_num(0.0, posinf=9.0)
    vocab = logits.shape[1]
    token_ids = [data.draw(st.integers(0, vocab - 1)) for _ in range(len(logits))]
    num_top = data.draw(st.integers(0, min(vocab, 20)))
    told, expected = (kind.score(logits, token_ids, num_top) for kind in (cpu_sampling, sampling))
    assert told[:3] == expected[:3]
    assert torch.equal(told.top, expected.top)


def test_weights_are_exponentials_to_the_last_bits() -> None:
    logits = -torch.cat([torch.rand(4000, dtype=torch.float64) * 690, torch.rand(4000, dtype=torch.float64) * 1e-3])
    logits[0] = 0.0
    weights = sampling.weights(logits.unsqueeze(0), [1.0])[0]
    assert weights[0] == 1
    torch.testing.assert_close(weights, logits.exp(), rtol=4e-16, atol=0)


def test_what_is_no_number_comes_last() -> None:
    logits = torch.tensor([[NAN, -3.0, NAN, -3.0], [NAN, -INF, NAN, -INF], [INF, 1.0, NAN, INF]])
    assert sampling.argmax(logits) == cpu_sampling.argmax(logits) == [1, 1, 0]
    draws = draws_of([(row, 1.0, 0, 1.0, 0.0, u) for row in range(3) for u in (0.0, 0.999)], 3)
    assert sampling.draw(logits, draws) == cpu_sampling.draw(logits, draws) == [1, 3, 1, 3, 0, 3]
