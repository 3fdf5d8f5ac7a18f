"""How fast a kernel runs steps of a random network, and how that compares with what the step must move and compute.

    python -m model.kernels.bench [--preset small|gpt2s] [--kernel NAME] [--threads N] [--dtype bfloat16]

Times are the best of several: what the machine can do when nothing else disturbs it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from model.cache import MemoryBatch, MemoryCache
from model.config import MosaicConfig
from model.kernels.choice import KERNELS, choose_path, make_kernel
from model.kernels.kernel import Kernel
from model.mosaic_v1 import MemoryMosaic
from model.presets import PRESETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK_SIZE = 32
CONTEXT = 192


@dataclass(frozen=True, slots=True)
class Work:
    """A step: `sequences` that have `context` tokens and bring `new` each."""

    name: str
    sequences: int
    context: int
    new: int

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.new

    def num_pairs(self) -> int:
        """Pairs read by all tokens together."""
        return self.sequences * sum(range(self.context, self.context + self.new))

    def operations(self, c: MosaicConfig) -> float:
        """Floating point operations: every product counts two."""
        per_token = c.n_layer * (5 * c.n_embd**2 + 2 * c.n_embd * c.pmem_size * c.pmem_count)
        reads = c.n_layer * 2 * c.n_embd * self.num_pairs()
        return 2.0 * (self.num_tokens * per_token + reads + self.sequences * c.vocab_size * c.n_embd)

    def bytes_moved(self, c: MosaicConfig, weight: int, pair: int) -> float:
        """Weights once, and every sequence's pairs once; `weight` and `pair` are bytes per number."""
        weights = c.n_layer * (5 * c.n_embd**2 + 2 * c.n_embd * c.pmem_size * c.pmem_count) + c.vocab_size * c.n_embd
        pairs = self.sequences * (self.context + self.new - 1) * 2 * c.n_embd * c.n_layer
        return float(weights * weight + pairs * pair)


WORKS = (
    *(Work(f"decode, batch {n}", n, CONTEXT, 1) for n in (1, 8, 32)),
    *(Work(f"prefill, {n} tokens", 1, 0, n) for n in (128, 512)),
)


def best_times(
    kernel: Kernel, config: MosaicConfig, work: Work, memory_dtype: torch.dtype, seconds: float
) -> tuple[float, float]:
    """Shortest of as many runs as fit into `seconds`: without and with snapshots, in turn.

    Snapshots are taken as a prefix cache does, at every block's end; of a single new token always.
    """
    each = -(-(work.context + work.new) // BLOCK_SIZE)
    cache = MemoryCache(
        config,
        num_blocks=each * work.sequences,
        block_size=BLOCK_SIZE,
        num_slots=work.sequences + work.num_tokens,
        memory_dtype=memory_dtype,
        keys_by_dimension=kernel.keys_by_dimension,
    )
    cache.keys.normal_()
    cache.values.normal_()
    batch = MemoryBatch(
        cache,
        torch.arange(work.sequences),
        torch.arange(each * work.sequences).view(work.sequences, each),
        (work.context,) * work.sequences,
        (work.new,) * work.sequences,
    )
    tokens = torch.arange(work.num_tokens)
    is_kept = (tokens % work.new % BLOCK_SIZE == 0) & (tokens % work.new > 0) | (work.new == 1)
    batches = (batch, replace(batch, snapshots=(work.sequences + tokens).where(is_kept, -1)))
    token_ids = torch.randint(config.vocab_size, (work.num_tokens,))
    best, end = [float("inf")] * 2, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, each_batch in enumerate(batches):
            started = time.perf_counter()
            kernel.step(token_ids, each_batch)
            best[i] = min(best[i], time.perf_counter() - started)
    return best[0], best[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m model.kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--kernel", choices=KERNELS, default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--memory-dtype", choices=DTYPES, default="float16")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row (default: %(default)s)")
    options = parser.parse_args(arguments)
    config, dtype, memory_dtype = PRESETS[options.preset], DTYPES[options.dtype], DTYPES[options.memory_dtype]
    torch.manual_seed(0)
    path = choose_path(config, options.kernel, device="cpu", dtype=dtype, block_size=BLOCK_SIZE)
    torch.set_num_threads(options.threads if path.startswith("torch") else 1)
    model = MemoryMosaic(config).eval().requires_grad_(False).cast_weights(dtype)
    kernel = make_kernel(model, path, num_threads=options.threads)
    table = Table("step", "ms", "tokens/s", "GB/s", "GFLOP/s", "ms with snapshots", box=None)
    for work in WORKS:
        seconds, with_snapshots = best_times(kernel, config, work, memory_dtype, options.seconds)
        moved = work.bytes_moved(config, dtype.itemsize, memory_dtype.itemsize)
        rates = (work.num_tokens / seconds, moved / seconds / 1e9, work.operations(config) / seconds / 1e9)
        figures = (f"{seconds * 1e3:.2f}", f"{rates[0]:.0f}", f"{rates[1]:.1f}", f"{rates[2]:.0f}")
        table.add_row(work.name, *figures, f"{with_snapshots * 1e3:.2f}")
    Console().print(f"{options.preset}, {options.dtype} weights, {options.memory_dtype} pairs, {path}", table)


if __name__ == "__main__":
    main()
