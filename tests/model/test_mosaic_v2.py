"""The second version: its parallel and its cached form against the plain equations, gradients, numbers out of range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from model import gated_average as gated_average_module
from model.cache import SimpleMemory
from model.config import MosaicV2Config
from model.factory import build_network
from model.gated_average import gated_average, gated_step
from model.mosaic_v2 import MemoryMosaicV2
from model.past_v2 import Memory, ParallelPastV2
from model.presets import V2_PRESETS
from tests.model.mosaics import (
    assert_close,
    draw_ids,
    random_sizes,
    random_v2_model,
    served,
    small_v2_config,
    v2_configs,
)
from tests.model.naive_v2 import naive_v2_logits


@settings(max_examples=30, deadline=None)
@given(v2_configs(), st.integers(0, 1000), st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 5))
def test_parallel_and_cached_form_equal_the_equations(
    config: MosaicV2Config, seed: int, lengths: list[int], block_size: int
) -> None:
    model = random_v2_model(config, seed)
    sequences = draw_ids(config.vocab_size, *lengths, seed=seed)
    with torch.no_grad():
        cached = served(model, sequences, seed, block_size=block_size)
        for sequence, logits in zip(sequences, cached, strict=True):
            expected = naive_v2_logits(model.state_dict(), config, sequence.tolist(), config.long_delay)
            assert_close(model(sequence[None])[0], expected, 1e-9)
            assert_close(logits, expected, 1e-9)


def test_in_float32_too() -> None:
    config = small_v2_config(short_window=30, long_delay=8, max_train_delay=30)
    model = random_v2_model(config, dtype=torch.float32).requires_grad_(False)
    sequences = draw_ids(11, 90, 41)
    for sequence, logits in zip(sequences, served(model, sequences, 0, block_size=4), strict=True):
        expected = naive_v2_logits(model.state_dict(), config, sequence.tolist(), 8)
        assert_close(model(sequence[None])[0], expected, 1e-5)
        assert_close(logits, expected, 1e-5)


@pytest.mark.parametrize("lengths", [(130, 64, 1, 65), (300, 2, 2, 2, 2, 2, 2, 40)])
def test_long_and_short_sequences_share_batches(lengths: tuple[int, ...]) -> None:
    # Beyond chunks of the parallel sum, windows and the short-term blocks that window and chunk demand.
    model = random_v2_model(small_v2_config(short_window=40, long_delay=20, max_train_delay=40)).requires_grad_(False)
    sequences = draw_ids(11, *lengths)
    cached = served(model, sequences, seed=5, block_size=16, max_chunk=70, chunk=lambda rng: rng.choice([1, 1, 70]))
    for sequence, logits in zip(sequences, cached, strict=True):
        assert_close(logits, model(sequence[None])[0], 1e-9)


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_gradients_are_those_of_the_equations(monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    monkeypatch.setattr(gated_average_module, "CHUNK_TOKENS", 3)
    config = small_v2_config(n_embd=6, vocab_size=5, short_window=5, long_delay=delay, max_train_delay=5)
    model = random_v2_model(config)
    token_ids = draw_ids(5, 13)[0]

    def gradients(logits: Tensor) -> list[Tensor]:
        loss = torch.nn.functional.cross_entropy(logits[:-1], token_ids[1:])
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected = gradients(naive_v2_logits(dict(model.named_parameters()), config, token_ids.tolist(), delay))
    actual = gradients(model(token_ids[None])[0])
    for (name, _), a, e in zip(model.named_parameters(), actual, expected, strict=True):
        assert e.any(), name
        assert_close(a, e, 1e-9)


@pytest.mark.parametrize("time", [1, 2, 7])
def test_gradients_of_few_tokens(time: int) -> None:
    model = random_v2_model(small_v2_config(n_embd=4, n_layer=1, vocab_size=5))
    token_ids = torch.stack(draw_ids(5, time, time))
    names = [name for name, _ in model.named_parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        logits = functional_call(model, dict(zip(names, parameters, strict=True)), (token_ids,))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids.flatten())

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


def test_it_learns_with_delays_that_vary() -> None:
    torch.manual_seed(0)
    model = MemoryMosaicV2(small_v2_config())
    token_ids = torch.stack(draw_ids(11, 20, 20))
    losses = []
    for _ in range(60):
        logits = model(token_ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.02 * parameter.grad / (parameter.grad.norm() + 1e-9)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_training_draws_delays_and_serving_has_one() -> None:
    model = random_v2_model(small_v2_config(short_window=9, long_delay=3, max_train_delay=9))
    token_ids = torch.zeros(1, 20, dtype=torch.int64)

    def delays() -> set[int]:
        pasts = [model._whole_past(token_ids) for _ in range(200)]
        return {past.delay for past in pasts}

    assert delays() == {3}
    model.train()
    assert delays() == set(range(3, 10))


def test_what_each_memory_shows() -> None:
    # Keys all alike: a read is the plain mean of the pairs that are seen, here of their numbers.
    time, window, delay = 23, 7, 5
    past = ParallelPastV2(torch.zeros(1, time, dtype=torch.int64), window=window, delay=delay)
    keys = torch.ones(1, time, 1, 1)
    numbers = (torch.arange(time) - 1.0).view(1, time, 1, 1)
    for memory in Memory:
        read = past.read(keys, keys, numbers, memory).flatten()
        for t in range(time):
            seen = range(max(t - window + 1, 0), t) if memory is Memory.SHORT else range(t - delay + 1)
            assert past.num_visible(memory)[t] == len(seen)
            assert read[t] == pytest.approx(sum(seen) / len(seen) if seen else 0)


def test_one_step_of_a_gated_sum_is_the_parallel_form_however_long_and_wild() -> None:
    torch.manual_seed(0)
    time = 3000
    x = torch.randn(1, time, 2, 4)
    log_gate = 60 * torch.randn(1, time, 2)
    log_decay = -torch.rand(1, time, 2) * torch.tensor([1e-3, 30.0])
    mantissa, scale = gated_average(x, log_gate, log_decay)
    m, s = torch.zeros(1, 2, 4), torch.full((1, 2), -math.inf)
    exact, exact_scale = m.double(), s.double()
    directions = []
    for t in range(time):
        m, s = gated_step(x[:, t], log_gate[:, t], log_decay[:, t], m, s)
        parts = (tensor[:, t].double() for tensor in (x, log_gate, log_decay))
        exact, exact_scale = gated_step(*parts, exact, exact_scale)
        directions.append(exact / exact.norm(dim=-1, keepdim=True))
        assert_close(m / m.norm(dim=-1, keepdim=True), directions[-1], 1e-4)
    assert mantissa.isfinite().all()
    assert scale.isfinite().all()
    assert_close(mantissa / mantissa.norm(dim=-1, keepdim=True), torch.stack(directions, 1), 1e-4)
    assert_close(scale[:, -1], exact_scale, 1e-5)


@pytest.mark.parametrize("factor", [1.0, 200.0])
def test_gradients_stay_finite_where_gates_leave_every_range(factor: float) -> None:
    model = random_v2_model(small_v2_config(), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "key.gate" in name or "key.decay" in name:
                parameter.mul_(factor)
    model(torch.stack(draw_ids(11, 150, 150))).log_softmax(-1).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name


def test_gates_below_every_range_open_a_text_too() -> None:
    model = random_v2_model(small_v2_config()).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "key.gate" in name:
            parameter.mul_(3000)
    # From the first token on: a gate of exp(-1000) before anything else was summed.
    sequences = draw_ids(11, *[9] * 8)
    for sequence, logits in zip(sequences, served(model, sequences, 3), strict=True):
        assert_close(logits, model(sequence[None])[0], 1e-9)


def test_a_model_served_without_its_short_tables_is_refused() -> None:
    model = random_v2_model(small_v2_config())
    memory = SimpleMemory(model.config, 1, 4, memory_dtype=torch.float64, state_dtype=torch.float64)
    batch = memory.extend([2])
    object.__setattr__(batch, "short_tables", None)
    with pytest.raises(ValueError, match="short_tables"):
        model(torch.zeros(2, dtype=torch.int64), batch)


def test_averages_do_not_depend_on_how_a_text_is_cut() -> None:
    # Bit for bit where matrix products cannot differ: the state after the same tokens in chunks of other sizes.
    model = random_v2_model(small_v2_config(n_layer=1), dtype=torch.float32).requires_grad_(False)
    ids = draw_ids(11, 23)[0]

    def sums(sizes: list[int]) -> Tensor:
        memory = SimpleMemory(model.config, 1, 23)
        for part in torch.split(ids, sizes):
            step = model._cached_step(memory.extend([len(part)]))
            past = step.past(0)
            for kind in Memory:
                past.average(part[:, None, None] * torch.ones(2, 6), part[:, None] * torch.ones(2) / 9,
                             part[:, None] * torch.tensor([-0.1, -3.0]), kind)  # fmt: skip
                past.previous_contribution(part[:, None, None] * torch.ones(2, 6), kind)
            step.commit()
        return memory.cache.state.clone()

    whole = sums([23])
    for seed in range(5):
        assert torch.equal(sums(random_sizes(23, seed)), whole)


def test_published_sizes() -> None:
    def count(preset: str) -> tuple[int, int]:
        with torch.device("meta"):
            model = build_network(V2_PRESETS[preset])
        return model.num_parameters, model.num_parameters - 2 * model.embedding.weight.numel()

    assert 9.85e9 < count("v2-10b")[0] < 9.95e9
    assert 1.45e9 < count("v2-1.5b")[1] < 1.55e9


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = MemoryMosaicV2(small_v2_config(n_embd=64, n_layer=3, persistent_size=100, vocab_size=50))
    state = model.state_dict()
    for layer in range(3):
        for name, inputs in (
            ("contextual.long.key.projection", 64),
            ("contextual.output", 128),
            ("persistent.down", 100),
        ):
            weight = state[f"blocks.{layer}.{name}.weight"]
            sigma = 1 / math.sqrt(2 * inputs * (layer + 1))
            assert weight.abs().max() <= 3 * sigma
            assert float(weight.std()) == pytest.approx(sigma, rel=0.05)
        bandwidth = f"blocks.{layer}.contextual.short.bandwidth"
        assert state[f"{bandwidth}.log_beta0"].eq(1.5).all()
        assert state[f"{bandwidth}.alpha"].eq(torch.tensor(1 / 3)).all()
        assert state[f"blocks.{layer}.contextual.short.value.mix"].min() >= 0
