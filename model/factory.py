"""The network that a configuration describes, whatever its version."""

from __future__ import annotations

from model.config import MosaicConfig, MosaicV2Config, NetworkConfig
from model.mosaic_v1 import MemoryMosaic
from model.mosaic_v2 import MemoryMosaicV2
from model.network import MosaicNetwork


def build_network(config: NetworkConfig) -> MosaicNetwork:
    """A network with freshly drawn weights; on the meta device, with none."""
    if isinstance(config, MosaicConfig):
        return MemoryMosaic(config)
    if isinstance(config, MosaicV2Config):
        return MemoryMosaicV2(config)
    raise ValueError(f"no network is known for {type(config).__name__}")
