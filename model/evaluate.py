"""Validation loss of a model directory on a text, and what narrower types cost it.

    python -m model.evaluate MODEL_DIR --text FILE[.xz] [--dtype bfloat16 --memory-dtype float16 --baseline float32]

The text's documents, one after another and each ended by `<|endoftext|>`, are cut into windows without overlap; every
token is predicted once, from those before it in its window. By default through the memory cache, as when serving.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from model.cache import SimpleMemory
from model.checkpoint import load_model
from model.kernels.choice import KERNELS, QUANTIZATIONS, choose_path, make_kernel
from model.kernels.kernel import Kernel
from model.network import MosaicNetwork
from model.tokenizer import END_OF_TEXT, Tokenizer
from model.training.corpus import read_documents

BLOCK_SIZE = 32
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model and the form in which it is run."""

    model: MosaicNetwork
    memory_dtype: torch.dtype = torch.float32
    """Type of the pairs in the memory cache."""
    kernel: Kernel | None = None
    """What serves the model; None runs the parallel form, which has no memory cache."""
    chunk: int = 128
    """Tokens of a window that one step absorbs."""

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Iterator[Tensor]:
        """[windows, time] -> logits [windows, chunk, vocab], chunk after chunk."""
        if self.kernel is None:
            yield self.model(token_ids)
            return
        windows, time = token_ids.shape
        memory = SimpleMemory(
            self.model.config,
            windows,
            time,
            block_size=BLOCK_SIZE,
            memory_dtype=self.memory_dtype,
            state_dtype=torch.float64 if self.model.dtype is torch.float64 else torch.float32,
            keys_by_dimension=self.kernel.keys_by_dimension,
        )
        for part in torch.split(token_ids, self.chunk, dim=1):
            batch = memory.extend([part.shape[1]] * windows)
            yield self.kernel.step(part.flatten(), batch, rows=torch.arange(part.numel())).view(*part.shape, -1)


@dataclass
class Score:
    """Sums over the tokens predicted so far."""

    num_tokens: int = 0
    nats: float = 0.0
    baseline_nats: float = 0.0
    divergence: float = 0.0
    """Kullback-Leibler divergence from the baseline's predictions, nats."""

    def add(self, logits: Tensor, targets: Tensor, baseline: Tensor | None) -> None:
        """Counts predictions [..., vocab] of `targets` [...]."""
        predicted = F.log_softmax(logits.flatten(0, -2).double(), dim=-1)
        self.num_tokens += targets.numel()
        self.nats += _nats(predicted, targets)
        if baseline is not None:
            expected = F.log_softmax(baseline.flatten(0, -2).double(), dim=-1)
            self.baseline_nats += _nats(expected, targets)
            self.divergence += F.kl_div(predicted, expected, reduction="sum", log_target=True).item()


def read_text(path: Path, tokenizer: Tokenizer) -> list[int]:
    """The documents of a text as one run of token ids, each ended by the end token.

    The file is UTF-8, plain or .xz, its documents separated by lines `<|endoftext|>`; they are stripped, and empty ones
    left out. ValueError where the file or the tokenizer does not allow it.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} to end documents with")
    return [token_id for document in read_documents(path) for token_id in (*tokenizer.encode(document), end)]


def window_batches(token_ids: Sequence[int], window: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [windows, time], in order; the last window may be shorter and comes alone."""
    ids = torch.tensor(token_ids, dtype=torch.int64)
    whole = (len(ids) - 1) // window
    inputs = ids[: whole * window].view(whole, window)
    targets = ids[1 : whole * window + 1].view(whole, window)
    if whole:
        yield from zip(torch.split(inputs, batch), torch.split(targets, batch), strict=True)
    if len(ids) - 1 > whole * window:
        rest = ids[whole * window :]
        yield rest[None, :-1], rest[None, 1:]


def evaluate(subject: Subject, inputs: Tensor, targets: Tensor, baseline: Subject | None, score: Score) -> None:
    """Adds the predictions of one batch of windows [windows, time] to `score`.

    With a baseline the two go through the windows in chunks of the same size, side by side.
    """
    chunks = [subject.logits(inputs)] if baseline is None else [subject.logits(inputs), baseline.logits(inputs)]
    start = 0
    for logits in zip(*chunks, strict=True):
        end = start + logits[0].shape[1]
        score.add(logits[0], targets[:, start:end], logits[1] if baseline is not None else None)
        start = end


def _nats(log_probabilities: Tensor, targets: Tensor) -> float:
    return F.nll_loss(log_probabilities, targets.flatten(), reduction="sum").item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.evaluate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="documents, plain or .xz")
    parser.add_argument("--window", type=_count, help="tokens per window (default: the trained context)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: %(default)s)")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="none", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the stored pairs; auto: float16 beside weights of 16 bits or less, else theirs "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--baseline", choices=DTYPES, help="compare with the model in this type throughout, run by plain torch"
    )
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="what runs the model (default: %(default)s)")
    parser.add_argument("--parallel", action="store_true", help="run windows in one pass, without the memory cache")
    parser.add_argument("--chunk", type=_count, default=128, help="tokens absorbed per step (default: %(default)s)")
    parser.add_argument("--batch", type=_count, default=16, help="windows side by side (default: %(default)s)")
    parser.add_argument("--max-windows", type=_count, help="stop after so many windows")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _run(options: argparse.Namespace, progress: Progress) -> Table:
    tokenizer = Tokenizer.load(options.model_dir)
    if tokenizer is None:
        raise ValueError(f"{options.model_dir}: has no tokenizer.json, so it cannot read text")
    token_ids = read_text(options.text, tokenizer)
    if len(token_ids) < 2:
        raise ValueError(f"{options.text}: no text to predict")
    tested = _subject(options, options.dtype, options.memory_dtype, options.kernel, options.quantization)
    baseline = _subject(options, options.baseline, options.baseline, "torch", "none") if options.baseline else None
    window = options.window or tested.model.config.block_size
    if options.max_windows:
        token_ids = token_ids[: options.max_windows * window + 1]
    score = Score()
    batches = list(window_batches(token_ids, window, options.batch))
    for inputs, targets in progress.track(batches, description="Evaluating"):
        evaluate(tested, inputs, targets, baseline, score)
    return _report(tested, baseline, score, len(tokenizer.bytes_of(token_ids[1:])))


def _subject(options: argparse.Namespace, dtype: str, memory_dtype: str, kernel: str, quantization: str) -> Subject:
    model = load_model(options.model_dir, dtype=DTYPES[dtype])
    if options.parallel:
        return Subject(model)
    path = choose_path(
        model.config, kernel, device="cpu", dtype=model.dtype, block_size=BLOCK_SIZE, quantization=quantization
    )
    serving = make_kernel(model, path, num_threads=len(os.sched_getaffinity(0)))
    if memory_dtype == "auto":
        memory_dtype = "float16" if model.dtype.itemsize == 2 or quantization != "none" else dtype
    return Subject(model, DTYPES[memory_dtype], serving, options.chunk)


def _report(tested: Subject, baseline: Subject | None, score: Score, num_bytes: int) -> Table:
    table = Table("weights", "pairs", "kernel", "tokens", "nats/token", "bits/byte", "change", "mean KL")
    table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False

    def add(subject: Subject, nats: float, *comparison: str) -> None:
        form = (_name(subject.memory_dtype), subject.kernel.path) if subject.kernel else ("", "one pass")
        losses = f"{nats / score.num_tokens:.4f}", f"{nats / math.log(2) / num_bytes:.4f}"
        table.add_row(_name(subject.model.dtype), *form, str(score.num_tokens), *losses, *comparison)

    if baseline is None:
        add(tested, score.nats)
        return table
    add(baseline, score.baseline_nats)
    add(
        tested, score.nats, f"{score.nats / score.baseline_nats - 1:+.4%}", f"{score.divergence / score.num_tokens:.2e}"
    )
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on stderr."""
    options = _parser().parse_args(arguments)
    errors = Console(stderr=True)
    try:
        with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
            table = _run(options, progress)
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
