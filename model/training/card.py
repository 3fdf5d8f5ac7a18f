"""The model card (README.md) of a model trained here: how it was trained, what it loses on a text, how it writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.card import architecture, table, tokens
from model.config import NetworkConfig
from model.training.recipe import Recipe
from model.training.report import LOG_FILE
from model.training.samples import TEMPERATURE, TOP_K

UNKNOWN = (
    "## To be filled in\n\nWhat the text was, under which licence the model may be passed on and what it is for. "
    "Whoever shares it should say so here."
)


@dataclass(frozen=True, slots=True)
class Loss:
    """On a whole text, every token predicted from those before it in its window."""

    window: int
    num_tokens: int
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Completion:
    """The first and only one for its seed."""

    prompt: str
    seed: int
    text: str


def trained_card(
    name: str,
    about: str | None,
    recipe: Recipe,
    config: NetworkConfig,
    num_parameters: int,
    weights: str,
    losses: Sequence[Loss],
    completions: Sequence[Completion],
) -> str:
    """The card's Markdown. `about`, Markdown too, is what could not be measured: an introduction, then sections."""
    introduction, _, sections = (about or "").partition("\n## ")
    parts = [
        f"# {name}",
        introduction.strip(),
        "A Memory Mosaic, a language model made of associative memories "
        "([arXiv 2405.06394](https://arxiv.org/abs/2405.06394)).",
        table(architecture(config, num_parameters, weights)),
        tokens(config),
        f"## {sections.strip()}" if sections else UNKNOWN,
        "## Training",
        table(_training(recipe)),
        "An epoch takes each of these texts' windows as often as its weight says:",
        table({source.path.name: f"{source.weight:g}" for source in recipe.data.sources}),
        "## Validation",
        _validation(losses),
        "## Completions",
        f"Drawn from the likeliest {TOP_K} tokens at temperature {TEMPERATURE}: the first for each seed, nothing "
        "selected. What follows the prompt is the model's; a text that does not end was cut.",
        *(_completion(completion) for completion in completions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _training(recipe: Recipe) -> dict[str, str]:
    training, last = recipe.training, _last_of_log(recipe)
    final = f"{training.final_learning_rate:g}"
    schedule = {
        "cosine": f"cosine to {final}",
        "constant": "constant"
        + (f", over the last {training.decay_steps} steps down to {final}" if training.decay_steps else ""),
    }[training.schedule]
    begun = {"begun with": f"the weights of {training.initial.name}"} if training.initial else {}
    return begun | {
        "steps": last["step"],
        "batch": f"{training.batch} windows of {recipe.data.window} tokens",
        "tokens": f"{int(last['tokens']):,}",
        "epochs": f"{float(last['epoch']):.2f}",
        "optimiser": f"{training.optimiser}, betas {training.betas[0]:g} and {training.betas[1]:g}, "
        f"weight decay {training.weight_decay:g}, gradients cut at {training.clip:g}",
        "learning rate": f"{training.learning_rate:g} after {training.warmup_steps} steps of warm-up, {schedule}",
        "autocast": training.autocast or "none",
        "seed": str(training.seed),
    }


def _last_of_log(recipe: Recipe) -> dict[str, str]:
    path = recipe.run.directory / LOG_FILE
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        raise ValueError(f"{path}: no step was logged")
    return lines[-1]


def _validation(losses: Sequence[Loss]) -> str:
    rows = ["| window | tokens | nats per token | bits per byte |", "|---|---|---|---|"]
    rows += [
        f"| {loss.window} | {loss.num_tokens:,} | {loss.nats_per_token:.3f} | {loss.bits_per_byte:.3f} |"
        for loss in losses
    ]
    return (
        "The whole text that was held out, in order, each document followed by `<|endoftext|>`, cut into windows "
        "without overlap; every token is predicted from those before it in its window. Through the memory cache, as "
        "the model is served, in float32.\n\n" + "\n".join(rows)
    )


def _completion(completion: Completion) -> str:
    text = "".join(char if char.isprintable() or char == "\n" else "�" for char in completion.text.rstrip())
    quoted = "\n".join(f"> {line}" for line in f"**{completion.prompt.strip()}**{text}".split("\n"))
    return f"Seed {completion.seed}:\n\n{quoted}"


def read_about(path: Path) -> str:
    """Raises ValueError where it is no text of a sensible length, OSError where it cannot be read."""
    if path.stat().st_size > 1 << 20:
        raise ValueError(f"{path}: too long for a model card")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
