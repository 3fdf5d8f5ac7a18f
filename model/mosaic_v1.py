"""Memory Mosaics, first version (arXiv 2405.06394): embedding, blocks of two memories, head."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from model.arithmetic import compute_dtype
from model.cache import MemoryBatch
from model.cached_past import CachedStep
from model.config import MosaicConfig
from model.initialise import initialise
from model.layers import Block
from model.network import MosaicNetwork
from model.past import ParallelPast


class MemoryMosaic(MosaicNetwork):
    """A network of blocks with a contextual and a persistent memory of pairs."""

    config: MosaicConfig
    PRECISE: ClassVar[tuple[str, ...]] = (".leak", ".log_scale", ".mix")

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__(
            config,
            (Block(config) for _ in range(config.n_layer)),
            norm_bias=config.bias,
            is_tied=config.tied,
            logit_scale=config.logit_scale,
        )
        # On the meta device values would be drawn for nothing, and the draws would import torch's compiler.
        if self.embedding.weight.device.type != "meta":
            initialise(self, config)

    def _whole_past(self, token_ids: Tensor) -> ParallelPast:  # noqa: ARG002
        return ParallelPast()

    def _cached_step(self, batch: MemoryBatch) -> CachedStep:
        return CachedStep(batch, self.config, compute_dtype(self.dtype))
