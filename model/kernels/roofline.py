"""What a step of a network takes at least on this machine: its bytes and operations, and the rates of both.

    python -m model.kernels.roofline [--preset small|gpt2s | --model DIR] [--quantization int8]

prints both as one JSON object: the bound of any step follows from it by sums and quotients. No kernel is timed here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from model.config import MosaicConfig, NetworkConfig
from model.kernels.choice import QUANTIZATIONS, choose_path
from model.kernels.cpu_library import BFLOAT16, FLOAT32, INT8, kernel_path, library
from model.kernels.kernel import QUANTISED, split_path
from model.presets import PRESETS

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_DTYPES = {**WEIGHT_DTYPES, "float16": torch.float16}
BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What steps of a network move and compute; a product counts two operations.

    Every step reads the weights once (`weights_bytes`) and each sequence's pairs once (`pair_bytes` each). It computes
    for every new token, for every sequence's logits, and for every pair that a token reads.
    """

    weights_bytes: float
    pair_bytes: float
    token_operations: float
    output_operations: float
    pair_operations: float

    @classmethod
    def of(cls, c: MosaicConfig, *, weight: int = 2, pair: int = 2) -> Self:
        """`weight` and `pair` are bytes per number."""
        per_token = c.n_layer * (5 * c.n_embd**2 + 2 * c.n_embd * c.pmem_size * c.pmem_count)
        per_output, per_pair = c.vocab_size * c.n_embd, 2 * c.n_embd * c.n_layer
        return cls(
            weights_bytes=float((per_token + per_output) * weight),
            pair_bytes=float(per_pair * pair),
            token_operations=2.0 * per_token,
            output_operations=2.0 * per_output,
            pair_operations=2.0 * per_pair,
        )


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

    def products(self, config: MosaicConfig) -> float:
        """Operations with weights."""
        costs = StepCosts.of(config)
        return self.num_tokens * costs.token_operations + self.sequences * costs.output_operations

    def reads(self, config: MosaicConfig) -> float:
        """Operations with pairs."""
        return StepCosts.of(config).pair_operations * self.num_pairs()

    def bytes_moved(self, config: MosaicConfig, weight: int, pair: int) -> float:
        """Weights once, and every sequence's pairs once; `weight` and `pair` are bytes per number."""
        costs = StepCosts.of(config, weight=weight, pair=pair)
        return costs.weights_bytes + self.sequences * (self.context + self.new - 1) * costs.pair_bytes


@dataclass(frozen=True, slots=True)
class Machine:
    """What it does at best with so many threads: bytes a second, and operations with weights and with pairs."""

    bytes_rate: float
    product_rate: float
    read_rate: float

    @classmethod
    def measured(cls, path: str, dtype: torch.dtype, num_threads: int) -> Self | None:
        """By the instructions of a kernel's path; None where it has none of its own."""
        lib, (name, is_quantised) = library(), split_path(path)
        if lib is None or kernel_path(name) is None:
            return None
        weight_type = INT8 if is_quantised else BFLOAT16 if dtype is torch.bfloat16 else FLOAT32
        encoded = str(name).encode()
        return cls(
            lib.mosaic_read_rate(encoded, num_threads),
            lib.mosaic_product_rate(encoded, weight_type, num_threads),
            lib.mosaic_product_rate(encoded, FLOAT32, num_threads),
        )

    def bound_s(self, work: Work, config: MosaicConfig, num_bytes: float) -> float:
        """The least time that `work` can take."""
        computing = work.products(config) / self.product_rate + work.reads(config) / self.read_rate
        return max(num_bytes / self.bytes_rate, computing)

    def __str__(self) -> str:
        rates = f"{self.product_rate / 1e9:.0f} and (pairs, float32) {self.read_rate / 1e9:.0f} Gop/s"
        return f"this machine: {self.bytes_rate / 1e9:.1f} GB/s, {rates}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 where the model has no kernel whose rates could be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m model.kernels.roofline", description=(__doc__ or "").split("\n")[0]
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--preset", choices=PRESETS, default="small")
    what.add_argument("--model", type=Path, help="directory of a model, instead of a preset")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--memory-dtype", choices=MEMORY_DTYPES, default="float16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    try:
        config = NetworkConfig.load(options.model / "config.json") if options.model else PRESETS[options.preset]
        costs, machine = _measured(config, options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**asdict(costs), **asdict(machine)}, indent=1))
    return 0


def _measured(config: NetworkConfig, options: argparse.Namespace) -> tuple[StepCosts, Machine]:
    if not isinstance(config, MosaicConfig):
        raise ValueError(f"{config.architecture}: only the first version's steps are counted")  # noqa: TRY004
    dtype, pair = WEIGHT_DTYPES[options.dtype], MEMORY_DTYPES[options.memory_dtype].itemsize
    path = choose_path(config, device="cpu", dtype=dtype, block_size=BLOCK_SIZE, quantization=options.quantization)
    machine = Machine.measured(path, dtype, options.threads)
    if machine is None:
        raise ValueError(f"{path}: the CPU kernels were not built, and plain torch has no rates of its own")
    weight = 1 if path.endswith(QUANTISED) else dtype.itemsize
    return StepCosts.of(config, weight=weight, pair=pair), machine


if __name__ == "__main__":
    sys.exit(main())
