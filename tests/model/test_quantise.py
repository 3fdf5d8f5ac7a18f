"""int8 weights in plain torch: what one number costs, that sums are exact, and what a network keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.layers import Linear, PersistentMemory
from model.mosaic_v1 import MemoryMosaic
from model.quantise import QuantisedPersistentMemory, product, quantise, quantise_network
from tests.model.mosaics import small_config


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 5), depth=st.integers(1, 70), exponent=st.integers(-30, 30))
def test_a_number_moves_by_half_a_step_at_most(seed: int, rows: int, depth: int, exponent: int) -> None:
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    levels, steps = quantise(x)
    assert levels.abs().amax(-1).eq(127).all()
    assert ((levels * steps - x).abs() <= steps * 0.5001).all()


def test_zeros_and_what_is_next_to_nothing_become_zero() -> None:
    for row in (torch.zeros(1, 5), torch.full((1, 5), 1e-38)):
        levels, steps = quantise(row)
        assert not levels.any()
        assert steps.item() == 0


@pytest.mark.parametrize("depth", [7, 1040, 1041, 5000])
def test_sums_are_exact(depth: int) -> None:
    x, w = quantise(torch.randn(3, depth)), quantise(torch.randn(4, depth).sign())
    sums = x.rows.long() @ w.rows.long().T
    assert torch.equal(product(x, w), sums.float() * (w.steps.T * x.steps))


def test_a_network_keeps_no_matrix_and_stays_close() -> None:
    torch.manual_seed(0)
    config = small_config(n_embd=64, n_head=4, pmem_size=150, pmem_count=2, vocab_size=50, bias=True)
    model = MemoryMosaic(config).eval().requires_grad_(False)
    tokens = torch.randint(50, (2, 30))
    quantised = quantise_network(copy.deepcopy(model))
    kinds = [type(module) for module in quantised.modules()]
    assert Linear not in kinds
    assert PersistentMemory not in kinds
    assert kinds.count(QuantisedPersistentMemory) == config.n_layer
    exact = model(tokens)
    error = (quantised(tokens) - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.03
