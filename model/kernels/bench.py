"""How fast a kernel runs steps of a random network, and how near that comes to what the machine allows.

    python -m model.kernels.bench [--preset small|gpt2s|v2-small] [--kernel NAME] [--threads N] [--quantization int8]

Times are the best of several: what the machine can do when nothing else disturbs it. The bound of a step is the longer
of moving its bytes at the rate at which memory is read here, and of its operations at the rates of products here.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Column, Table

from model.cache import MemoryBatch, MemoryCache
from model.config import MosaicV2Config, NetworkConfig
from model.factory import build_network
from model.kernels.choice import KERNELS, QUANTIZATIONS, choose_path, make_kernel
from model.kernels.kernel import QUANTISED, Kernel
from model.kernels.roofline import BLOCK_SIZE, MEMORY_DTYPES, WEIGHT_DTYPES, Machine, Work
from model.presets import SHAPES

CONTEXT = 192


WORKS = (
    *(Work(f"decode, batch {n}", n, CONTEXT, 1) for n in (1, 8, 32)),
    *(Work(f"prefill, {n} tokens", 1, 0, n) for n in (128, 512)),
)


def best_times(
    kernel: Kernel, config: NetworkConfig, work: Work, memory_dtype: torch.dtype, seconds: float
) -> tuple[float, float]:
    """Shortest of as many runs as fit into `seconds`: without and with snapshots, in turn.

    Snapshots are taken as a prefix cache does, at every block's end; of a single new token always.
    """
    each = -(-(work.context + work.new) // BLOCK_SIZE)
    has_short = isinstance(config, MosaicV2Config)
    tables = torch.arange((1 + has_short) * each * work.sequences).view(1 + has_short, work.sequences, each)
    cache = MemoryCache(
        config,
        num_blocks=tables.numel(),
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
        tables[0],
        (work.context,) * work.sequences,
        (work.new,) * work.sequences,
        short_tables=tables[1] if has_short else None,
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
    parser.add_argument("--preset", choices=SHAPES, default="small")
    parser.add_argument("--kernel", choices=KERNELS, default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bfloat16")
    parser.add_argument("--memory-dtype", choices=MEMORY_DTYPES, default="float16")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row (default: %(default)s)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    options = parser.parse_args(arguments)
    config, dtype, memory_dtype = (
        SHAPES[options.preset],
        WEIGHT_DTYPES[options.dtype],
        MEMORY_DTYPES[options.memory_dtype],
    )
    torch.manual_seed(0)
    path = choose_path(
        config,
        options.kernel,
        device="cpu",
        dtype=dtype,
        block_size=BLOCK_SIZE,
        quantization=options.quantization,
    )
    torch.set_num_threads(options.threads if path.startswith("torch") else 1)
    model = build_network(config).eval().requires_grad_(False).cast_weights(dtype)
    kernel = make_kernel(model, path, num_threads=options.threads)
    machine = Machine.measured(path, dtype, options.threads)
    weight_bytes = 1 if path.endswith(QUANTISED) else dtype.itemsize
    table = Table(
        Column("step", no_wrap=True),
        "ms",
        "tokens/s",
        "MB",
        "Gop",
        "bound, ms",
        "times bound",
        "ms with snapshots",
        box=None,
    )
    for work in WORKS:
        seconds, with_snapshots = best_times(kernel, config, work, memory_dtype, options.seconds)
        moved = work.bytes_moved(config, weight_bytes, memory_dtype.itemsize)
        operations = work.products(config) + work.reads(config)
        bound = machine.bound_s(work, config, moved) if machine else None
        table.add_row(
            work.name,
            f"{seconds * 1e3:.2f}",
            f"{work.num_tokens / seconds:.0f}",
            f"{moved / 1e6:.0f}",
            f"{operations / 1e9:.2f}",
            *((f"{bound * 1e3:.2f}", f"{seconds / bound:.2f}") if bound else ("", "")),
            f"{with_snapshots * 1e3:.2f}",
        )
    weights = "int8" if path.endswith(QUANTISED) else options.dtype
    Console().print(f"{options.preset}, {weights} weights, {options.memory_dtype} pairs, {path}")
    if machine:
        Console().print(str(machine), highlight=False)
    Console().print(table)


if __name__ == "__main__":
    main()
