"""The network: its parallel and its cached form against the plain equations, gradients, isolation of sequences."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from model import arithmetic
from model.cache import SimpleMemory
from model.cached_past import CachedStep
from model.config import MosaicConfig
from model.mosaic_v1 import MemoryMosaic
from model.past import Average
from tests.model.mosaics import (
    assert_close,
    batch_of,
    configs,
    draw_ids,
    random_model,
    random_sizes,
    served,
    small_config,
)
from tests.model.naive import naive_logits


def float64_memory(config: MosaicConfig) -> SimpleMemory:
    return SimpleMemory(config, 3, 9, memory_dtype=torch.float64, state_dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5))
def test_parallel_and_cached_form_equal_the_equations(
    config: MosaicConfig, seed: int, lengths: list[int], block_size: int
) -> None:
    model = random_model(config, seed)
    sequences = draw_ids(config.vocab_size, *lengths, seed=seed)
    with torch.no_grad():
        cached = served(model, sequences, seed, block_size=block_size)
        for sequence, logits in zip(sequences, cached, strict=True):
            expected = naive_logits(model.state_dict(), config, sequence.tolist())
            assert_close(model(sequence[None])[0], expected, 1e-9)
            assert_close(logits, expected, 1e-9)


@pytest.mark.parametrize("lengths", [(130, 64, 1, 65), (300, 2, 2, 2, 2, 2, 2, 40)])
def test_long_and_short_sequences_share_batches(lengths: tuple[int, ...]) -> None:
    # Beyond one chunk of the parallel average, and so unequal that reads fall into several groups.
    model = random_model(small_config(bias=True)).requires_grad_(False)
    sequences = draw_ids(11, *lengths)
    cached = served(model, sequences, seed=5, block_size=16, chunk=lambda rng: rng.choice([1, 1, 70]))
    for sequence, logits in zip(sequences, cached, strict=True):
        assert_close(logits, model(sequence[None])[0], 1e-9)


@pytest.mark.parametrize("time", [1, 2, 7])
@pytest.mark.parametrize(
    "changes", [{}, {"value_extractor": "linearconv", "bias": True, "tied": False, "pmem_count": 2}]
)
def test_gradients_of_the_parallel_form(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], time: int) -> None:
    monkeypatch.setattr(arithmetic, "CHUNK_TOKENS", 3)
    model = random_model(small_config(n_embd=4, n_layer=1, vocab_size=5, **changes))
    token_ids = torch.stack(draw_ids(5, time, time))
    names = [name for name, _ in model.named_parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        logits = functional_call(model, dict(zip(names, parameters, strict=True)), (token_ids,))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids.flatten())

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


def test_every_parameter_is_trained() -> None:
    torch.manual_seed(0)
    model = MemoryMosaic(small_config(bias=True, tied=False))
    token_ids = torch.stack(draw_ids(11, 9, 9))
    losses = []
    for _ in range(40):
        logits = model(token_ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.02 * parameter.grad / parameter.grad.norm()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_logits_asked_for_are_those_of_the_last_tokens() -> None:
    model = random_model(small_config())
    first, second = float64_memory(model.config), float64_memory(model.config)
    for new in ([4, 1, 2], [1, 1, 1], [0, 3, 1]):
        token_ids = torch.cat(draw_ids(11, *new))
        every = model(token_ids, first.extend(new), all_logits=True)
        last = model(token_ids, second.extend(new))
        ends = torch.tensor([n for n in new if n]).cumsum(0) - 1
        torch.testing.assert_close(last, every[ends], rtol=1e-12, atol=1e-14)
        assert last.dtype == torch.float64
        assert not last.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_float32_whatever_the_weights(dtype: torch.dtype) -> None:
    precise = random_model(small_config(), dtype=torch.float32).requires_grad_(False)
    model = copy.deepcopy(precise).cast_weights(dtype)
    token_ids = torch.stack(draw_ids(11, 6, 6))
    expected = precise(token_ids)
    memory = SimpleMemory(model.config, 2, 6, memory_dtype=torch.float16)
    assert model(token_ids).dtype == torch.float32
    assert_close(model(token_ids), expected, 0.05)
    logits = model(token_ids.flatten(), memory.extend([6, 6]), all_logits=True)
    assert logits.dtype == torch.float32
    assert_close(logits, expected.flatten(0, 1), 0.05)
    narrow = {name for name, p in model.named_parameters() if p.dtype == dtype}
    if dtype != torch.float32:
        assert {"embedding.weight", "blocks.0.persistent.keys", "blocks.1.contextual.output.weight"} <= narrow
        assert not any(name.endswith(("leak", "log_scale", "mix")) or "norm" in name for name in narrow)


def test_a_sequence_of_infinite_numbers_spoils_no_other() -> None:
    model = random_model(small_config(tied=False), dtype=torch.float32).requires_grad_(False)
    model.embedding.weight[10] = math.inf
    memory = SimpleMemory(model.config, 2, 40)
    good, bad = draw_ids(10, 8)[0], torch.full((8,), 10)
    expected = model(good[None])[0]
    batch = memory.extend([8, 8])
    logits = model(torch.cat([bad, good]), batch, all_logits=True)
    assert logits[:8].isnan().all()
    assert_close(logits[8:], expected, 1e-5)
    # A new sequence is given the slot and, in part, the blocks of the spoiled one; a block is read beyond its pairs.
    tables = [batch.block_tables[0].tolist()]
    reused = batch_of(memory.cache, [int(batch.slots[0])], tables, [0], [5])
    assert_close(model(good[:5], reused, all_logits=True), expected[:5], 1e-5)


def test_averages_do_not_depend_on_how_a_text_is_cut() -> None:
    # Bit for bit, for one projection: only the matrix products around it may round differently.
    x, log_decay = torch.randn(23, 2, 6), torch.tensor([-0.01, -3.0])

    def averages(sizes: list[int]) -> Tensor:
        config, done = small_config(n_layer=1), []
        memory = SimpleMemory(config, 1, 23)
        for part in torch.split(x, sizes):
            step = CachedStep(memory.extend([len(part)]), config, torch.float32)
            past = step.past(0)
            done.append(past.average(part, log_decay, Average.CONTEXTUAL))
            past.average(part, log_decay, Average.PERSISTENT)
            past.previous_contribution(part)
            step.commit()
        return torch.cat(done)

    whole = averages([23])
    for seed in range(5):
        assert torch.equal(averages(random_sizes(23, seed)), whole)


def test_misshapen_token_ids_are_refused() -> None:
    model = random_model(small_config())
    with pytest.raises(ValueError, match=r"\[batch, time\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="token"):
        model(torch.zeros(2, 0, dtype=torch.int64))
    memory = SimpleMemory(model.config, 1, 4)
    with pytest.raises(ValueError, match=r"expected \[2\], got \[3\]"):
        model(torch.zeros(3, dtype=torch.int64), memory.extend([2]))


def test_counts_and_types() -> None:
    model = random_model(small_config())
    assert model.dtype == torch.float64
    assert model.num_parameters == sum(tensor.numel() for tensor in model.state_dict().values())
