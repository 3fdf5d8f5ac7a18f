"""A training run's recipe: one YAML file, read into frozen values; single keys may be overridden. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_MAX_FILE_BYTES = 1 << 20

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Source(_Part):
    """A text to train on."""

    path: Path
    """A file, UTF-8, plain or .xz, or a directory of them. Relative to the recipe's directory."""
    format: Literal["text", "jsonl"] = "text"
    """text: documents separated by `<|endoftext|>`; jsonl: one a line, a JSON string or an object with `text`."""
    weight: Positive = 1.0
    """How often an epoch takes its windows: 2 twice each, 0.5 every second one."""


class Data(_Part):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    tokenizer: Path | None = None
    """A tokenizer.json to use; without one a byte-level BPE is trained on the text."""
    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)] | None = None
    """Of the tokenizer to train, with `<|endoftext|>`."""
    held_out: Fraction = 0.02
    """Share of the documents, chosen by the hash of their text, that is never trained on."""
    validation: Path | None = None
    """A text to validate on instead of what is held out; its documents are not trained on either."""
    window: Annotated[int, Field(ge=2, le=1 << 20)]
    """Tokens that a prediction may see: the model's context in training."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give either tokenizer or vocab_size")
        return self


class Training(_Part):
    initial: Path | None = None
    """A model directory to begin with the weights of, instead of drawn ones. Its configuration and tokenizer have to be
    the recipe's. Relative to the recipe's directory."""
    steps: Count
    batch: Count
    """Windows per step, over all processes."""
    micro_batch: Count
    """Windows that one process computes at a time; gradients accumulate until the batch is done."""
    optimiser: Literal["adamw", "muon"] = "adamw"
    """muon: the blocks' matrices move by orthogonal steps, all else by AdamW."""
    learning_rate: Positive
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine down to `final_learning_rate`; or constant, with a decay over the last steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Annotated[int, Field(ge=0)] = 0
    """Length of the decay that ends a constant schedule."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    autocast: Literal["bfloat16"] | None = "bfloat16"
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch: {self.batch} is no multiple of micro_batch = {self.micro_batch}")
        return self


class Run(_Part):
    directory: Path
    """Where tokens, state, log and the model go. Relative to the recipe's directory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None
    """Threads of one process on a CPU; by default torch's own choice."""
    checkpoint_minutes: Positive = 5.0
    log_every: Count = 10
    evaluate_every: Count = 250
    evaluation_windows: Count | None = None
    """Validate on so many windows, spread over the text, instead of all."""
    prompts: tuple[str, ...] = ()
    """Continued after each validation, to be read."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the model directory."""
    tensorboard: bool = False
    """Writes the log for TensorBoard too; needs the extra `train`."""


class Recipe(_Part):
    model: Mapping[str, Any]
    """`architecture` and the fields of its configuration; what the data determines is filled in."""
    data: Data
    training: Training
    run: Run

    def fixed(self) -> dict[str, Any]:
        """What has to stay as it is when a run is resumed; schedule, log and places may change.

        Of `training.initial` its name: once the run has a state, the directory itself is no longer read.
        """
        data = {"window": self.data.window, "weights": [source.weight for source in self.data.sources]}
        training = self.training.model_dump(mode="json", include={"batch", "seed", "optimiser", "betas", "autocast"})
        initial = {"initial": self.training.initial.name} if self.training.initial else {}
        return {"model": dict(self.model), "data": data, "training": training | initial}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with overrides like `training.steps=100`.

    Raises OSError where the file cannot be read, ValueError naming file and key where it is no recipe.
    """
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path}: too large for a recipe")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected the sections model, data, training and run")  # noqa: TRY004
    for override in overrides:
        _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first(error)}") from None
    return _with_absolute_paths(recipe, path.resolve().parent)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.split(".")
    if not equals or not name:
        raise ValueError(f"{override!r}: expected KEY=VALUE, such as training.steps=100")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{override!r}: {section} has no keys")  # noqa: TRY004
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{override!r}: {text!r} is not a YAML value") from None


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, problem["loc"]))
    return f"{key}: {problem['msg']}" if key else problem["msg"]


def _with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    data = recipe.data.model_copy(
        update={
            "sources": tuple(s.model_copy(update={"path": base / s.path}) for s in recipe.data.sources),
            "tokenizer": recipe.data.tokenizer and base / recipe.data.tokenizer,
            "validation": recipe.data.validation and base / recipe.data.validation,
        }
    )
    training = recipe.training.model_copy(
        update={"initial": recipe.training.initial and base / recipe.training.initial}
    )
    run = recipe.run.model_copy(update={"directory": base / recipe.run.directory})
    return recipe.model_copy(update={"data": data, "training": training, "run": run})
