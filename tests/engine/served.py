"""An engine over a kernel, without a checkpoint's directory and with the sizes that a test wants."""

from __future__ import annotations

import torch

from model.cache import MemoryCache
from model.config import NetworkConfig
from model.kernels.kernel import Kernel
from service.engine.block_manager import BlockManager
from service.engine.constraints import Constraints
from service.engine.engine import Engine
from service.engine.runner import ModelRunner
from service.engine.scheduler import Scheduler, SchedulerConfig


def engine_over(
    kernel: Kernel,
    config: NetworkConfig,
    blocks: BlockManager,
    budget: int,
    memory_dtype: torch.dtype,
    state_dtype: torch.dtype = torch.float32,
    constraints: Constraints | None = None,
) -> Engine:
    """`budget` is the most tokens of a step; a sequence may be as long as the model was trained for."""
    num_short_blocks = 0 if blocks.short_term is None else blocks.short_term.num_blocks

    def make_cache(num_blocks: int, num_slots: int) -> MemoryCache:
        return MemoryCache(
            config,
            num_blocks=num_blocks,
            block_size=blocks.block_size,
            num_slots=num_slots,
            memory_dtype=memory_dtype,
            state_dtype=state_dtype,
            keys_by_dimension=kernel.keys_by_dimension,
        )

    cache = make_cache(blocks.num_blocks + num_short_blocks, blocks.num_slots + blocks.prefix_cache.num_slots)
    num_places = blocks.swap_pool.num_places
    swap = make_cache(num_places, num_places) if num_places else None
    limits = SchedulerConfig(blocks.num_slots, budget, config.block_size, config.vocab_size, config.eos_token_id)
    return Engine(Scheduler(limits, blocks), ModelRunner(kernel, cache, config, constraints, swap))
