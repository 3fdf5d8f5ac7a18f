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

from model.config import MosaicConfig, MosaicV2Config, NetworkConfig
from model.fingerprint import CONFIG_FILE
from model.kernels.choice import QUANTIZATIONS, choose_path
from model.kernels.cpu_library import BFLOAT16, FLOAT32, INT8, kernel_path, library
from model.kernels.kernel import QUANTISED, split_path
from model.past_v2 import Memory, num_visible
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
    def of(cls, c: NetworkConfig, *, weight: int = 2, pair: int = 2) -> Self:
        """`weight` and `pair` are bytes per number."""
        per_token = c.n_layer * _layer_weights(c)
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

    def num_reads(self, config: NetworkConfig) -> int:
        """Pairs of a layer read by all tokens together, each as often as it is read."""
        ends = range(self.context, self.context + self.new)
        return self.sequences * sum(_num_visible(config, position) for position in ends)

    def num_pairs(self, config: NetworkConfig) -> int:
        """Different pairs of a layer that are read."""
        last = self.context + self.new - 1
        visible = _num_visible(config, last)
        if isinstance(config, MosaicV2Config):  # a window that moves on leaves pairs behind which were read too
            window = config.short_window - 1
            visible += max(last - window, 0) - max(self.context - window, 0)
        return self.sequences * visible

    def products(self, config: NetworkConfig) -> float:
        """Operations with weights."""
        costs = StepCosts.of(config)
        return self.num_tokens * costs.token_operations + self.sequences * costs.output_operations

    def reads(self, config: NetworkConfig) -> float:
        """Operations with pairs."""
        return StepCosts.of(config).pair_operations * self.num_reads(config)

    def bytes_moved(self, config: NetworkConfig, weight: int, pair: int) -> float:
        """Weights once, and every sequence's pairs once; `weight` and `pair` are bytes per number."""
        costs = StepCosts.of(config, weight=weight, pair=pair)
        return costs.weights_bytes + self.num_pairs(config) * costs.pair_bytes


def _layer_weights(c: NetworkConfig) -> int:
    """Numbers of a layer that each token is multiplied with."""
    if isinstance(c, MosaicV2Config):
        return 6 * c.n_embd**2 + 4 * c.n_embd * c.n_head + 3 * c.n_embd * c.persistent_size
    assert isinstance(c, MosaicConfig)
    return 5 * c.n_embd**2 + 2 * c.n_embd * c.pmem_size * c.pmem_count


def _num_visible(c: NetworkConfig, position: int) -> int:
    """Pairs of a layer that the token at this position reads, of the second version in both memories."""
    if not isinstance(c, MosaicV2Config):
        return position
    at = torch.tensor(position)
    return sum(int(num_visible(at, memory, window=c.short_window, delay=c.long_delay)) for memory in Memory)


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

    def bound_s(self, work: Work, config: NetworkConfig, num_bytes: float) -> float:
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
        config = NetworkConfig.load(options.model / CONFIG_FILE) if options.model else PRESETS[options.preset]
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
