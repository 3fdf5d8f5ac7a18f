"""The second version's parameters by the names and in the shapes that the C++ library knows them by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.config import MosaicV2Config
from model.mosaic_v2 import LOG_VALUE_SCALE_MAX, BlockV2, ContextualMemoryV2


def sizes_v2(config: MosaicV2Config) -> dict[str, float]:
    """What the library's `Sizes` has to say of such a network, without the type."""
    return {
        "version": 2,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "pre_norm": 1,
        "persistent_size": config.persistent_size,
        "short_window": config.short_window,
        "long_delay": config.long_delay,
        "logit_scale": 1.0,
    }


def matrices_v2(block: BlockV2) -> Iterator[tuple[str, int, Tensor, Tensor | None]]:
    """Name, index, weight and bias of each matrix of a block."""
    memories, persistent = block.contextual, block.persistent
    # Key and value of both memories as one matrix, so that one pass over the input serves all.
    parts = [
        part.projection.weight for memory in (memories.short, memories.long) for part in (memory.key, memory.value)
    ]
    yield "projection", 0, torch.cat(parts), None
    yield "contextual_output", 0, memories.output.weight, None
    yield "persistent_gate_up", 0, torch.cat([persistent.gate.weight, persistent.up.weight]), None
    yield "persistent_down", 0, persistent.down.weight, None


def vectors_v2(block: BlockV2) -> Iterator[tuple[str, Tensor]]:
    """Name and values of everything else; of both memories, the short-term one first."""
    both = _memories(block)
    yield "contextual_norm.weight", block.contextual_norm.weight
    yield "persistent_norm.weight", block.persistent_norm.weight
    yield "gates", torch.cat([part.weight for memory in both for part in (memory.key.gate, memory.key.decay)])
    yield "mix", torch.cat([memory.value.mix for memory in both])
    scales = torch.cat([memory.value.log_scale for memory in both])
    yield "value_scale", scales.abs().clamp(max=LOG_VALUE_SCALE_MAX).exp()
    bandwidths = [torch.stack(memory.bandwidth.values()) for memory in both]
    yield from zip(("beta0", "beta1", "alpha"), torch.cat(bandwidths, 1), strict=True)


def _memories(block: BlockV2) -> tuple[ContextualMemoryV2, ContextualMemoryV2]:
    return block.contextual.short, block.contextual.long
