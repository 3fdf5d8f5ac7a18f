"""Writes a model with random weights: any shape, for measurements and tests, nothing that has learned.

    python -m model.init OUT_DIR --preset small|gpt2s|tiny|v2-small|v2-tiny|... [--seed N] [--force]

Sizes given as options take the place of the preset's. Every token that such a model generates is visible text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from model.checkpoint import save_model
from model.config import MosaicConfig, NetworkConfig
from model.factory import build_network
from model.presets import SHAPES
from model.staging import check_free, complete_or_absent
from model.syllables import NUM_UNPRINTED, syllable_tokenizer_json
from model.tokenizer import TOKENIZER_FILE

SIZES = (
    "vocab_size", "n_layer", "n_head", "n_embd", "pmem_size", "pmem_count", "block_size", "persistent_size",
    "short_window", "long_delay", "max_train_delay",
)  # fmt: skip


def init_model(config: NetworkConfig, out_dir: Path, *, seed: int = 0, force: bool = False) -> NetworkConfig:
    """Writes config.json, model.safetensors and tokenizer.json into `out_dir`; returns the configuration written.

    Its vocabulary's last ids, which are no visible text, are never sampled, and no token ends a text. Equal arguments
    give equal files. Raises ValueError where `out_dir` is not new or empty (unless `force`: then its model is
    replaced) or the vocabulary cannot be made, OSError where files cannot be written.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected a number from 0 to 2**64 - 1, got {seed}")
    check_free(out_dir, allow_files=force)
    tokenizer = syllable_tokenizer_json(config.vocab_size)
    config = replace(config, tokenizer_vocab_size=config.vocab_size - NUM_UNPRINTED, eos_token_id=None)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = build_network(config)
    with complete_or_absent(out_dir) as directory:
        save_model(model, config, directory)
        (directory / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.init", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="the directory to make; may exist if empty")
    parser.add_argument("--preset", choices=SHAPES, default="small", help="a known shape (default: %(default)s)")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{name} of the configuration")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the model that OUT_DIR holds")
    return parser


def _shape(preset: str, given: Mapping[str, int]) -> NetworkConfig:
    config = SHAPES[preset]
    if unknown := [name for name in given if not hasattr(config, name)]:
        raise ValueError(f"{unknown[0]}: {preset} is a {config.architecture}, which has no such size")
    config = type(config).from_dict({**config.to_dict(), **given})
    return replace(config, logit_scale=config.n_embd**-0.5) if isinstance(config, MosaicConfig) else config


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on stderr."""
    options = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    try:
        config = _shape(options.preset, given)
        with errors.status(f"Drawing weights for {options.out_dir}"):
            config = init_model(config, options.out_dir, seed=options.seed, force=options.force)
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, {config.vocab_size} ids"
    console.print(f"Wrote {options.out_dir}: {shape}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
