"""Shapes that go by a name, for random models and measurements."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from model.config import MosaicConfig, MosaicV2Config, NetworkConfig


def mosaic_of(
    *,
    vocab_size: int,
    n_layer: int,
    n_head: int,
    n_embd: int,
    pmem_size: int,
    pmem_count: int = 1,
    block_size: int = 1024,
) -> MosaicConfig:
    """A Memory Mosaic of these sizes; all else as the published `Library` code trains it by default."""
    return MosaicConfig(
        vocab_size=vocab_size,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        block_size=block_size,
        pmem_size=pmem_size,
        pmem_count=pmem_count,
        key_log_scale_max=5.0,
        persistent_key_log_scale_max=10.0,
        norm_eps=0.0,
        logit_scale=n_embd**-0.5,
        pre_norm=True,
        value_extractor="lowrlinearconv",
        bias=False,
        tied=True,
        has_persistent=True,
    )


PRESETS: Mapping[str, MosaicConfig] = MappingProxyType(
    {
        "tiny": mosaic_of(vocab_size=512, n_layer=2, n_head=2, n_embd=32, pmem_size=48, block_size=256),
        "small": mosaic_of(vocab_size=4096, n_layer=8, n_head=8, n_embd=256, pmem_size=896),
        "gpt2s": mosaic_of(vocab_size=50257, n_layer=12, n_head=12, n_embd=768, pmem_size=2688),
    }
)
"""`small` has 7.3M parameters; `gpt2s` has 123.6M, the size of GPT-2 small; `tiny` is for tests."""


V2_PRESETS: Mapping[str, MosaicV2Config] = MappingProxyType(
    {
        "v2-tiny": MosaicV2Config(
            vocab_size=512, n_layer=2, n_head=2, n_embd=32, persistent_size=48, block_size=256,
            short_window=32, long_delay=8, max_train_delay=32,
        ),
        "v2-small": MosaicV2Config(
            vocab_size=4096, n_layer=8, n_head=8, n_embd=256, persistent_size=768, block_size=1024
        ),
        "v2-1.5b": MosaicV2Config(
            vocab_size=128256, n_layer=24, n_head=16, n_embd=2048, persistent_size=6144, block_size=4096
        ),
        "v2-10b": MosaicV2Config(
            vocab_size=128256, n_layer=32, n_head=32, n_embd=4096, persistent_size=14336, block_size=4096
        ),
    }
)  # fmt: skip
"""Of the second version; `v2-small` has 10.0M parameters. The two largest are the paper's: 1.5 billion parameters
without embedding and head, 9.9 billion with them."""

SHAPES: Mapping[str, NetworkConfig] = MappingProxyType({**PRESETS, **V2_PRESETS})
"""Of every version."""
