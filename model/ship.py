"""Makes of a training run's model a directory to pass on: narrow weights, and a card that was measured.

    python -m model.ship CONFIG OUT_DIR --text FILE[.xz] [--about FILE.md ...] [section.key=value ...]

CONFIG and keys are those it was trained with. The card tells what the model loses on all of the text, which the run
must not have trained on, and shows completions of the recipe's prompts. What only a person knows (what it is for, data
and licences) comes from the Markdown files --about.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from model.card import CARD_FILE
from model.checkpoint import load_model, save_model
from model.evaluate import BLOCK_SIZE, Score, Subject, evaluate, read_text, window_batches
from model.kernels.choice import choose_path, make_kernel
from model.network import MosaicNetwork
from model.staging import check_free, complete_or_absent
from model.tokenizer import TOKENIZER_FILE, Tokenizer
from model.training.card import Completion, Loss, read_about, trained_card
from model.training.loop import MODEL
from model.training.recipe import Recipe, load_recipe
from model.training.samples import complete

SEEDS, SAMPLE_TOKENS, BATCH = (1, 2), 160, 16
PROMPT = "Once upon a time"
WEIGHTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def ship(
    recipe: Recipe, out_dir: Path, text: Path, about: str | None, weights: str, progress: Progress | None = None
) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and README.md into `out_dir`, all or nothing.

    Raises ValueError where `out_dir` is not new or empty, or the run's model, the text or the log are not as they
    should be, OSError where files cannot be read or written.
    """
    check_free(out_dir)
    source = recipe.run.directory / MODEL
    tokenizer = Tokenizer.load(source)
    if tokenizer is None:
        raise ValueError(f"{source}: has no tokenizer.json")
    narrow = load_model(source, dtype=WEIGHTS[weights])
    with complete_or_absent(out_dir) as directory:
        save_model(narrow, narrow.config, directory)
        (directory / TOKENIZER_FILE).write_bytes((source / TOKENIZER_FILE).read_bytes())
        # What is measured is what was written.
        model = load_model(directory)
        windows = dict.fromkeys((model.config.block_size, max(2, model.config.block_size // 2)))
        token_ids = read_text(text, tokenizer)
        if len(token_ids) < 2:
            raise ValueError(f"{text}: no text to predict")
        losses = [measure(model, tokenizer, token_ids, window, progress) for window in windows]
        card = trained_card(
            out_dir.name, about, recipe, model.config, model.num_parameters, weights, losses,
            sample(model, tokenizer, recipe.run.prompts or (PROMPT,)),
        )  # fmt: skip
        (directory / CARD_FILE).write_text(card, encoding="utf-8")


def measure(
    model: MosaicNetwork, tokenizer: Tokenizer, token_ids: Sequence[int], window: int, progress: Progress | None = None
) -> Loss:
    """The loss on all tokens but the first, through the memory cache, in the type of the weights."""
    path = choose_path(model.config, "auto", device="cpu", dtype=model.dtype, block_size=BLOCK_SIZE)
    subject = Subject(model, model.dtype, make_kernel(model, path, num_threads=len(os.sched_getaffinity(0))))
    batches, score = list(window_batches(token_ids, window, BATCH)), Score()
    shown = batches if progress is None else progress.track(batches, description=f"Windows of {window}")
    for inputs, targets in shown:
        evaluate(subject, inputs, targets, None, score)
    bits = score.nats / math.log(2)
    return Loss(window, score.num_tokens, score.nats / score.num_tokens, bits / len(tokenizer.bytes_of(token_ids[1:])))


def sample(model: MosaicNetwork, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[Completion]:
    """Every prompt with every seed, first tries."""
    device, window = torch.device("cpu"), model.config.block_size
    return [
        Completion(prompt, seed, complete(model, tokenizer, prompt, window, device, seed=seed, tokens=SAMPLE_TOKENS))
        for prompt in prompts
        for seed in SEEDS
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m model.ship", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the recipe of the run")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="the directory to make; its name is the model's")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as the run was given them")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="to measure on; plain or .xz")
    parser.add_argument(
        "--about", metavar="FILE", type=Path, action="append", default=[],
        help="Markdown for the card: use, data, licences; of several, one after the other",
    )  # fmt: skip
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16", help="their type (default: %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    errors = Console(stderr=True)
    try:
        recipe = load_recipe(options.config, options.overrides)
        about = "\n\n".join(read_about(path) for path in options.about) or None
        with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
            ship(recipe, options.out_dir, options.text, about, options.weights, progress)
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    Console().print(
        f"Wrote {options.out_dir}; read its {CARD_FILE} before it is passed on", highlight=False, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
