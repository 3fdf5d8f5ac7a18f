"""The training kernels against plain torch in float64: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import arithmetic
from model.kernels import training
from model.mosaic_v1 import MemoryMosaic
from tests.model.mosaics import random_model, small_config
from tests.model.plain import plain_logits

pytestmark = pytest.mark.skipif(not training.is_supported(), reason="no training kernels for this processor")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(function: Callable[..., Tensor], arguments: list[Tensor], rtol: float = 5e-6) -> None:
    """Value and gradients of `function` in float32, by the kernels, against those in float64, by torch."""
    narrow = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in arguments]
    wide = [x.double().requires_grad_() for x in arguments]
    found, expected = function(*narrow), function(*wide)
    assert found.grad_fn is not None
    assert expected.dtype == torch.float64
    gradient = randn(*expected.shape, seed=9)
    mine_all = [found, *torch.autograd.grad(found, narrow, gradient)]
    theirs_all = [expected, *torch.autograd.grad(expected, wide, gradient.double())]
    # Gradients that cancel leave the rounding of the sums they are made of.
    summed = 0.5 * gradient.numel() ** 0.5
    for mine, theirs in zip(mine_all, theirs_all, strict=True):
        assert mine.dtype == torch.float32
        error = (mine.double() - theirs).abs().max().item()
        # A decay's gradient sums products of values and slopes, which grow alike where an average hardly fades.
        terms = max(1, expected.square().mean().item()) if theirs.ndim == 1 else 1
        assert error <= rtol * max(theirs.abs().max().item(), summed * terms), f"off by {error:.3g}"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 230), st.integers(1, 230), st.integers(1, 70),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_reads(batch: int, heads: int, queries: int, pairs: int, dim: int, causal: bool, seed: int) -> None:
    if causal:
        pairs = queries
    # Two orders in memory: heads beside each other, as projections give them, and heads apart.
    q = randn(batch, queries, heads, dim, seed=seed).transpose(1, 2)
    k, v = (randn(batch, heads, pairs, dim, seed=seed + n) for n in (1, 2))
    compare(lambda q, k, v: arithmetic.read(q, k, v, causal=causal), [q, k, v])


@pytest.mark.parametrize(("scale", "rtol"), [(114.0, 1e-5), (22026.0, 5e-3)])
def test_logits_of_trained_scales_are_exact(scale: float, rtol: float) -> None:
    # In bfloat16 a unit key would err by 0.3 in a logit at a scale of 114, by 57 at 22026; in float32 by 1e-3 there.
    keys = torch.nn.functional.normalize(randn(1, 2, 200, 48, seed=1), dim=-1)
    compare(
        lambda k, v: arithmetic.read(k[:, :, 1:] * scale, k[:, :, :-1], v, causal=True), [keys, keys[:, :, 1:]], rtol
    )


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_narrows_all_products_but_the_logits_where_there_are_such(causal: bool) -> None:
    # With keys in bfloat16 the weights themselves would be wrong by a fifth.
    queries, keys = (torch.nn.functional.normalize(randn(2, 2, 210, 40, seed=n), dim=-1) for n in (0, 1))
    values, gradient = randn(2, 2, 210, 40, seed=2), randn(2, 2, 210, 40, seed=3)
    results = []
    for is_narrow in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in (queries * 114, keys, values))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_narrow):
            y = arithmetic.read(q, k, v, causal=causal)
        assert y.dtype == torch.float32
        results.append([y.detach(), *torch.autograd.grad(y, (q, k, v), gradient)])
    for narrow, wide in zip(*results, strict=True):
        assert (narrow - wide).abs().max() <= 0.01 * wide.abs().max()
        assert torch.equal(narrow, wide) is not training.narrows()


def test_a_certain_read_has_no_slope_but_rounding() -> None:
    # Each query finds its own key, with a weight that is 1: nothing it or the keys could change.
    keys = torch.nn.functional.normalize(randn(1, 1, 60, 16, seed=1), dim=-1)
    q, k = (keys * 500).requires_grad_(), keys.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = arithmetic.read(q, k, randn(1, 1, 60, 16, seed=2))
    for gradient in torch.autograd.grad(y, (q, k), randn(1, 1, 60, 16, seed=3)):
        assert gradient.abs().max() < 5e-3


@pytest.mark.parametrize(("scale", "narrow_error", "error"), [(114.0, 0.28, 4e-6), (22026.0, 58.0, 1e-3)])
def test_narrow_keys_spoil_logits_whatever_attention_does(scale: float, narrow_error: float, error: float) -> None:
    flash = 1
    exact = torch.nn.functional.normalize(randn(1, 8, 512, 48, seed=1).double(), dim=-1)
    logits = scale * exact @ exact.transpose(-1, -2)
    for dtype, expected in ((torch.bfloat16, narrow_error), (torch.float32, error)):
        queries, keys = (scale * exact).to(dtype), exact.to(dtype)
        # Attention multiplies what it is given, and adds up in float32.
        found = (queries.double() @ keys.double().transpose(-1, -2) - logits).abs().max().item()
        assert expected / 2 < found < expected * 2
        assert torch._fused_sdp_choice(queries, keys, keys, is_causal=True, scale=1.0) == flash
    assert torch._fused_sdp_choice(exact, exact, exact, is_causal=True, scale=1.0) == flash


def test_autocast_leaves_averages_and_what_torch_reads_as_they_are() -> None:
    q, k, v = (randn(1, 2, 60, 16, seed=n).requires_grad_() for n in range(3))
    decay = torch.full((60,), -0.1)
    averages, precise = arithmetic.leaky_average(q, decay), arithmetic.read(q * 100, k, v, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(arithmetic.leaky_average(q, decay), averages)
        with torch.no_grad():  # by torch alone
            torch.testing.assert_close(arithmetic.read(q * 100, k, v, causal=True), precise, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 140), st.integers(1, 3), st.integers(1, 40), st.floats(0, 6), st.integers(0, 99)
)
def test_averages_and_norms(batch: int, time: int, heads: int, dim: int, leak: float, seed: int) -> None:
    x = randn(batch, time, heads, dim, seed=seed)
    compare(arithmetic.leaky_average, [x, -leak * torch.linspace(0, 1, heads)], rtol=2e-5)
    compare(lambda x: arithmetic.unit(x, 0.1), [x])
    if dim > 1:  # of one number nothing but the sign remains
        compare(lambda x: arithmetic.unit(x, 0.0), [x])


def test_a_zero_vector_stays_zero() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    y = arithmetic.unit(x, 0.0)
    y.backward(torch.zeros(3, 8))
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    arguments = [randn(2, 3, 400, 32, seed=n).requires_grad_() for n in range(3)]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = arithmetic.read(*arguments, causal=True)
        results.append([y, *torch.autograd.grad(y, arguments, torch.ones_like(y))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def loss_gradients(logits: Tensor, token_ids: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_a_networks_gradients_are_those_of_the_plain_equations(dtype: torch.dtype, rtol: float) -> None:
    model: MemoryMosaic = random_model(small_config(pmem_count=2, norm_eps=1e-6), dtype=dtype)
    token_ids = torch.randint(11, (2, 150), generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = loss_gradients(model(token_ids), token_ids, [*parameters])
    wide = [parameter.detach().double().requires_grad_() for parameter in parameters]
    logits = plain_logits(dict(zip(names, wide, strict=True)), model.config, token_ids)
    for name, mine, theirs in zip(names, found, loss_gradients(logits, token_ids, wide), strict=True):
        error = (mine.double() - theirs).abs().max().item()
        assert error <= rtol * theirs.abs().max().item(), f"{name}: off by {error:.3g}"
