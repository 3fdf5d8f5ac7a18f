from __future__ import annotations

import pytest
import torch

from model.factory import build_network
from model.kernels.bench import main
from model.kernels.roofline import Machine, Work
from model.mosaic_v1 import MemoryMosaic
from model.presets import PRESETS, V2_PRESETS


def test_presets_have_the_sizes_they_name() -> None:
    with torch.device("meta"):
        sizes = [MemoryMosaic(PRESETS[name]).num_parameters for name in ("small", "gpt2s")]
    assert [round(size / 1e6, 1) for size in sizes] == [7.3, 123.6]


def test_work_counts_every_weight_once_a_token_and_every_pair_once_a_reader() -> None:
    config = PRESETS["small"]
    weights = 8 * (5 * 256**2 + 2 * 256 * 896) + 4096 * 256
    assert Work("", 1, 0, 1).products(config) == 2 * weights
    assert Work("", 1, 0, 3).num_reads(config) == 0 + 1 + 2
    assert Work("", 2, 10, 1).bytes_moved(config, 2, 4) == weights * 2 + 2 * 10 * 2 * 256 * 8 * 4


def test_work_of_the_second_version_is_that_of_both_memories() -> None:
    config = V2_PRESETS["v2-tiny"]  # a token reads the 31 pairs before it, and those 8 back and more
    with torch.device("meta"):
        network = build_network(config)
    matrices = sum(p.numel() for name, p in network.named_parameters() if p.ndim == 2 and name != "embedding.weight")
    assert Work("", 1, 0, 1).products(config) == 2 * matrices
    assert Work("", 1, 100, 1).num_reads(config) == Work("", 1, 100, 1).num_pairs(config) == 31 + 93
    assert Work("", 2, 0, 3).num_reads(config) == 2 * (0 + 1 + 2)
    assert Work("", 1, 40, 10).num_pairs(config) == (31 + 9) + (49 - 7)


@pytest.mark.parametrize("preset", ["tiny", "v2-tiny"])
def test_it_reports_every_step(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    main(["--preset", preset, "--seconds", "0.001", "--threads", "1", "--quantization", "int8"])
    out = capsys.readouterr().out
    assert "decode, batch 32" in out
    assert "prefill, 512 tokens" in out
    assert "int8 weights" in out


def test_a_bound_is_the_longer_of_moving_and_computing() -> None:
    config, work = PRESETS["small"], Work("", 1, 10, 1)
    fast_memory, fast_products = Machine(1e30, 1e9, 1e9), Machine(1e9, 1e30, 1e30)
    assert fast_memory.bound_s(work, config, 1e6) == pytest.approx((work.products(config) + work.reads(config)) / 1e9)
    assert fast_products.bound_s(work, config, 1e6) == pytest.approx(1e-3)
