"""Unit vectors, leaky averages and reads against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.arithmetic import CHUNK_TOKENS, compute_dtype, leaky_average, read, unit
from tests.model.mosaics import assert_close


def leaky_loop(x: Tensor, log_decay: Tensor) -> Tensor:
    state, averages = torch.zeros_like(x[:, 0]), []
    for x_t in x.unbind(1):
        state = state * torch.exp(log_decay)[:, None] + x_t
        averages.append(state)
    return torch.stack(averages, dim=1)


@pytest.mark.parametrize(
    "time", [1, 2, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 5, CHUNK_TOKENS**2 + 3]
)
def test_leaky_average(time: int) -> None:
    # From heads that never forget to one that forgets at once: exp(-1e4) is 0.
    x, log_decay = torch.randn(2, time, 5, 3, dtype=torch.float64), torch.tensor([-0.0, -1e-3, -0.5, -40, -1e4])
    log_decay = log_decay.double()
    assert_close(leaky_average(x, log_decay), leaky_loop(x, log_decay), 1e-12)


def test_leaky_average_in_float32_stays_close_over_a_long_text() -> None:
    x, log_decay = torch.randn(1, 3000, 2, 4), torch.tensor([-1e-3, -2.0])
    assert_close(leaky_average(x, log_decay), leaky_loop(x.double(), log_decay.double()), 1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-10, 0.5])
def test_unit(eps: float) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], dtype=torch.float64)
    norms = torch.tensor([5 / (5 + eps), 0.0, 1e-20 / (1e-20 + eps)], dtype=torch.float64)
    torch.testing.assert_close(unit(x, eps).norm(dim=-1), norms)
    assert torch.equal(unit(x.float()[1], eps), torch.zeros(2))


def test_gradient_of_a_zero_key_is_finite() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    unit(x, 1e-10).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_read_is_kernel_smoothing() -> None:
    # With unit keys the dot product orders pairs like the Gaussian kernel: |k - k_i|^2 = 2 - 2 k.k_i.
    keys, queries = (unit(torch.randn(1, 1, n, 4, dtype=torch.float64), 0.0) for n in (6, 3))
    values = torch.randn(1, 1, 6, 2, dtype=torch.float64)
    values = torch.cat([values, values], dim=-1)
    beta = 7.0
    kernel = torch.exp(-beta * (queries[0, 0, :, None] - keys[0, 0]).square().sum(-1))
    expected = kernel @ values[0, 0] / kernel.sum(-1, keepdim=True)
    assert_close(read(2 * beta * queries, keys, values)[0, 0], expected, 1e-12)
    hidden = torch.tensor([0.0, 0, 0, 0, 0, float("-inf")], dtype=torch.float64)
    fewer = kernel[:, :5] @ values[0, 0, :5] / kernel[:, :5].sum(-1, keepdim=True)
    assert_close(read(2 * beta * queries, keys, values, hidden.view(1, 1, 1, 6))[0, 0], fewer, 1e-12)


def test_compute_dtype() -> None:
    assert compute_dtype(torch.float64) == torch.float64
    assert {compute_dtype(t) for t in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
