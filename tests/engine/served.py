"""An engine over a kernel, without a checkpoint's directory and with the sizes that a test wants."""

from __future__ import annotations

import torch

from model.cache import MemoryCache
from model.config import NetworkConfig
from model.kernels.kernel import Kernel
from model.network import MosaicNetwork
from service.engine.block_manager import BlockManager
from service.engine.constraints import Constraints
from service.engine.engine import Engine
from service.engine.request import Request
from service.engine.runner import ModelRunner
from service.engine.sampler import SamplingRow, sample
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


def run(engine: Engine, requests: list[Request], arrivals: list[int]) -> dict[str, list[int]]:
    """Adds each request before the step of its number in `arrivals`; their tokens once all have ended."""
    produced: dict[str, list[int]] = {request.request_id: [] for request in requests}
    pending = sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
    step = 0
    while pending or engine.has_work:
        while pending and pending[0][0] <= step:
            engine.add_request(pending.pop(0)[1])
        for output in engine.step():
            produced[output.request_id] += output.new_token_ids
        engine.scheduler.check_integrity()
        step += 1
    return produced


def one_pass(model: MosaicNetwork, request: Request) -> list[int]:
    """The request's continuation by the parallel form alone: every token from a fresh pass over all before it."""
    tokens, sampling, generated = list(request.prompt_token_ids), request.sampling, 0
    while generated < sampling.max_tokens:
        logits = model(torch.tensor([tokens]))[0, -1:, : model.config.num_sampled_tokens]
        tokens += sample(logits, [SamplingRow(sampling, generated)])
        generated += 1
        if tokens[-1] == model.config.eos_token_id and not sampling.ignore_eos:
            break
    return tokens[len(request.prompt_token_ids) :]
