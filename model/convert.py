"""Turns a checkpoint of the published training code into a model directory.

    python -m model.convert CKPT.pt OUT_DIR [--tokenizer tokenizer.json | gpt2]

Reads the file without running code from it, and leaves either a complete directory or none.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.card import CARD_FILE, model_card
from model.checkpoint import save_model
from model.config import MosaicConfig
from model.gpt2_tokenizer import TokenizerDataError, gpt2_tokenizer_json
from model.published import (
    NANO_KEY_LOG_SCALE_MAX,
    NANO_REVISED_KEY_LOG_SCALE_MAX,
    ConversionError,
    PublishedFormat,
    detect_format,
    published_config,
)
from model.published_checkpoint import read_checkpoint
from model.published_weights import convert_weights
from model.staging import check_free, complete_or_absent
from model.tokenizer import TOKENIZER_FILE, Tokenizer

GPT2 = "gpt2"


@dataclass(frozen=True)
class Conversion:
    """A published checkpoint in our terms, not yet written."""

    layout: PublishedFormat
    config: MosaicConfig
    weights: Mapping[str, Tensor]
    tokenizer: str | None
    """The text of its tokenizer.json."""
    training: Mapping[str, Any]
    """What the training script recorded."""

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    def notes(self) -> list[str]:
        """What whoever converts should know, a sentence each."""
        return [note for note in (self._tokenizer_note(), self._bound_note()) if note]

    def _tokenizer_note(self) -> str | None:
        if self.tokenizer is None:
            hint = " (the published scripts train with --tokenizer gpt2)" if self.config.vocab_size == 50304 else ""
            return f"no --tokenizer given: the model is served for token ids only{hint}"
        if self.config.eos_token_id is None:
            return "the tokenizer has no <|endoftext|>: no token ends a text"
        return None

    def _bound_note(self) -> str | None:
        if self.layout is not PublishedFormat.NANO or not self._exceeds(NANO_REVISED_KEY_LOG_SCALE_MAX):
            return None
        return (
            f"log key scales exceed {NANO_REVISED_KEY_LOG_SCALE_MAX:g}, where the releases of nanoMosaics differ: "
            f"bounded at {self.config.key_log_scale_max:.4g}; "
            f"--key-log-scale-max {NANO_REVISED_KEY_LOG_SCALE_MAX:g} if it was trained with the later code"
        )

    def _exceeds(self, bound: float) -> bool:
        doubled = {"contextual.key.log_scale": 1, "persistent.key.log_scale": 2}
        return any(
            10 * times * weight.max().item() > bound
            for name, weight in self.weights.items()
            for ending, times in doubled.items()
            if name.endswith(ending)
        )


def convert_checkpoint(
    checkpoint: Path | str,
    out_dir: Path | str,
    tokenizer: str | Path | None = None,
    key_log_scale_max: float = NANO_KEY_LOG_SCALE_MAX,
) -> MosaicConfig:
    """Writes config.json, model.safetensors, tokenizer.json and README.md into `out_dir`, new or empty.

    `tokenizer` is the path of a tokenizer.json or "gpt2"; without one the model knows token ids only.
    `key_log_scale_max` applies to nanoMosaics, whose releases differ in it.

    ConversionError where the checkpoint, the tokenizer or `out_dir` cannot be used, TokenizerDataError where the
    data of "gpt2" is out of reach, OSError where a file cannot be read or written. `out_dir` is then as before.
    """
    _check_free(Path(out_dir))
    conversion = read_conversion(checkpoint, tokenizer, key_log_scale_max)
    write_conversion(conversion, Path(out_dir))
    return conversion.config


def read_conversion(
    checkpoint: Path | str,
    tokenizer: str | Path | None = None,
    key_log_scale_max: float = NANO_KEY_LOG_SCALE_MAX,
) -> Conversion:
    """Reads and checks everything, writes nothing; arguments and errors as in `convert_checkpoint`."""
    serialized = _tokenizer_json(tokenizer)
    published = read_checkpoint(Path(checkpoint))
    layout = detect_format(published.tensors, published.settings)
    config = published_config(layout, published.arguments, key_log_scale_max)
    if serialized is not None:
        config = _with_tokenizer(config, Tokenizer(serialized))
    weights = convert_weights(layout, config, published.tensors)
    training = {**published.settings, **published.arguments, **published.progress}
    return Conversion(layout, config, weights, serialized, training)


def write_conversion(conversion: Conversion, out_dir: Path) -> None:
    """Writes the model directory; ConversionError where `out_dir` is in use, OSError where it cannot be written."""
    _check_free(out_dir)
    name = out_dir.resolve().name
    card = model_card(name, conversion.layout.value, conversion.config, conversion.num_parameters, conversion.training)
    with complete_or_absent(out_dir) as directory:
        save_model(conversion.weights, conversion.config, directory)
        if conversion.tokenizer is not None:
            (directory / TOKENIZER_FILE).write_text(conversion.tokenizer, encoding="utf-8")
        (directory / CARD_FILE).write_text(card, encoding="utf-8")


def _tokenizer_json(tokenizer: str | Path | None) -> str | None:
    if tokenizer is None:
        return None
    if tokenizer == GPT2:
        return gpt2_tokenizer_json()
    path = Path(tokenizer)
    if not path.is_file():
        raise ConversionError(f"{path}: no such tokenizer file")
    try:
        return Tokenizer.from_file(path).serialized
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _with_tokenizer(config: MosaicConfig, tokenizer: Tokenizer) -> MosaicConfig:
    if not 0 < tokenizer.vocab_size <= config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {config.vocab_size}"
        )
    return replace(config, tokenizer_vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id)


def _check_free(out_dir: Path) -> None:
    try:
        check_free(out_dir)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.convert",
        description="Turn a checkpoint of the published Memory Mosaics training code (Library, its CUDA variant, or "
        "nanoMosaics) into a directory that Tessera serves.",
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT.pt", type=Path, help="the checkpoint that the training script wrote"
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="the directory to make; may exist if empty")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE|gpt2",
        help="a byte-level tokenizer.json, or gpt2 for the one the published scripts train with; "
        "without it the model is served for token ids only",
    )
    parser.add_argument(
        "--key-log-scale-max",
        metavar="X",
        type=float,
        default=NANO_KEY_LOG_SCALE_MAX,
        help="nanoMosaics only: the bound its code puts on log key scales, log(65535) = 11.09 in the first release "
        f"(default), {NANO_REVISED_KEY_LOG_SCALE_MAX:g} in the later one",
    )
    return parser


def _report(conversion: Conversion, out_dir: Path, console: Console) -> None:
    config = conversion.config
    table = Table(show_header=False, box=None)
    table.add_row("format", conversion.layout.value)
    table.add_row("parameters", f"{conversion.num_parameters:,}")
    table.add_row("shape", f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide")
    table.add_row("context", f"{config.block_size} tokens")
    tokens = config.tokenizer_vocab_size
    table.add_row("vocabulary", f"{config.vocab_size} ids" + (f", {tokens} of them tokens" if tokens else ""))
    console.print(table)
    console.print(f"Wrote {out_dir}", markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on stderr."""
    options = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        with errors.status(f"Converting {options.checkpoint.name}"):
            _check_free(options.out_dir)
            conversion = read_conversion(options.checkpoint, options.tokenizer, options.key_log_scale_max)
            write_conversion(conversion, options.out_dir)
    except (ConversionError, TokenizerDataError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    _report(conversion, options.out_dir, console)
    for note in conversion.notes():
        errors.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
