"""What a step takes beside the kernel, in microseconds: `python -m tests.engine.step_cost [--sequences N] [--vocab N]`.

Sequences decode while the network is replaced by logits made beforehand; the median of some hundred steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from model.cache import MemoryBatch, MemoryCache
from model.presets import mosaic_of
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.request import Request, SamplingParams
from service.engine.runner import ModelRunner
from service.engine.scheduler import Scheduler, SchedulerConfig

NUM_PROMPT, NUM_TOKENS, BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS = 100, 150, 32, 1024, 128
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 40": {"top_k": 40},
    "min_p 0.05": {"min_p": 0.05},
    "greedy, 5 logprobs": {"temperature": 0, "num_logprobs": 5},
    "greedy, all penalties": {
        **{"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    },
}


class PreparedLogits:
    """A kernel that computes nothing."""

    path, keys_by_dimension = "none", True

    def __init__(self, num_rows: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._logits = 3 * torch.randn(num_rows, vocab, generator=generator)
        self.seconds = 0.0

    def step(
        self,
        token_ids: Tensor,
        batch: MemoryBatch,
        *,
        rows: Tensor | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> Tensor:
        on_start()
        assert rows is None
        started_s = time.perf_counter()
        logits = self._logits[: len(batch.num_new)].clone()
        self.seconds += time.perf_counter() - started_s
        return logits


def step_seconds(num_seqs: int, vocab: int, params: dict[str, float]) -> list[float]:
    """Of every step in which all of `num_seqs` sequences decode."""
    config = mosaic_of(vocab_size=vocab, n_layer=1, n_head=1, n_embd=16, pmem_size=16)
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, MAX_SEQS)
    num_slots = blocks.num_slots + blocks.prefix_cache.num_slots
    cache = MemoryCache(config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_slots=num_slots)
    kernel = PreparedLogits(num_seqs, vocab)
    engine = Engine(Scheduler(SchedulerConfig(MAX_SEQS, 512, 1024, vocab), blocks), ModelRunner(kernel, cache, config))
    generator = random.Random(0)
    for i in range(num_seqs):
        prompt = tuple(generator.choices(range(vocab), k=NUM_PROMPT))
        sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=i, **params)  # type: ignore[arg-type]
        engine.add_request(Request(f"r{i}", prompt, sampling))
    seconds = []
    while engine.has_work:
        kernel.seconds, started_s = 0.0, time.perf_counter()
        num_outputs = len(engine.step())
        if num_outputs == num_seqs:
            seconds.append(time.perf_counter() - started_s - kernel.seconds)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step takes beside the kernel.")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, params in KINDS.items():
        seconds = [s for _ in range(3) for s in step_seconds(options.sequences, options.vocab, params)]
        print(f"{name}: {statistics.median(seconds) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
