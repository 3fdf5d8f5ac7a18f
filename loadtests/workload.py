"""What is asked: prompts of exact length drawn from a seed, or texts from a file, and the fields sent with them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loadtests.errors import WorkloadError

MAX_PROMPT_TOKENS = 1_000_000
MAX_OUTPUT_TOKENS = 1_000_000
DEFAULT_TOKEN_RANGE = (300, 4000)
"""Ids that every vocabulary of 4000 and more has, past the byte and special tokens most put first: a lone byte may be
half a character, and a server holds that back."""


@dataclass(frozen=True)
class Workload:
    """One kind of request, many instances. `prompt(i)` depends on (`seed`, `salt`, i) alone.

    `prompt_tokens` counts the whole prompt; its first `shared_prefix_tokens` are the same in every request with the
    same seed and salt, or one of `num_prefixes`, drawn for each request. With `texts`, prompts are those in turn and
    `prompt_tokens` is what the server says.
    """

    name: str = "standard"
    prompt_tokens: int = 128
    output_tokens: int = 128
    shared_prefix_tokens: int = 0
    num_prefixes: int = 1
    token_range: tuple[int, int] = DEFAULT_TOKEN_RANGE
    seed: int = 0
    salt: str = ""
    model: str | None = None
    ignore_eos: bool = True
    texts: tuple[str, ...] = field(default=(), repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = self.token_range
        _check(1 <= self.prompt_tokens <= MAX_PROMPT_TOKENS, f"prompt tokens: 1 to {MAX_PROMPT_TOKENS}")
        _check(1 <= self.output_tokens <= MAX_OUTPUT_TOKENS, f"output tokens: 1 to {MAX_OUTPUT_TOKENS}")
        _check(
            0 <= self.shared_prefix_tokens < self.prompt_tokens,
            "a shared prefix is shorter than the prompt: the rest is what differs",
        )
        _check(self.num_prefixes >= 1, "prefixes: at least 1")
        _check(0 <= low < high, "token range: LOW:HIGH with 0 <= LOW < HIGH")

    def prompt(self, index: int) -> list[int] | str:
        """Prompt number `index`: token ids, or text where texts were given."""
        if self.texts:
            return self.texts[index % len(self.texts)]
        own = self._draw(str(index), self.prompt_tokens - self.shared_prefix_tokens)
        return [*self._prefix_of(index), *own]

    def body(self, index: int) -> bytes:
        """The JSON body of request number `index`. Greedy and streaming, with the usage at the end."""
        fields: dict[str, Any] = {
            "prompt": self.prompt(index),
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.model is not None:
            fields["model"] = self.model
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps({**fields, **self.extra_body}, separators=(",", ":")).encode()

    def described(self) -> dict[str, Any]:
        """What a results file keeps: everything but the texts themselves."""
        return {**asdict(replace(self, texts=())), "num_texts": len(self.texts)}

    def _prefix_of(self, index: int) -> list[int]:
        if self.num_prefixes == 1:
            return self._prefixes[0]
        return random.Random(f"{self.seed}:{self.salt}:prefix of {index}").choice(self._prefixes)

    @cached_property
    def _prefixes(self) -> list[list[int]]:
        names = ["prefix", *(f"prefix {n}" for n in range(1, self.num_prefixes))]
        return [self._draw(name, self.shared_prefix_tokens) for name in names]

    def _draw(self, name: str, count: int) -> list[int]:
        low, high = self.token_range
        return random.Random(f"{self.seed}:{self.salt}:{name}").choices(range(low, high), k=count)


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens."""

    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0


PRESETS: Mapping[str, Shape] = {"long": Shape(512, 32), "prefix": Shape(528, 32, shared_prefix_tokens=512)}
"""Workloads of fixed shape that a run can take along: a long prompt with a short answer; a long shared prefix."""
PRESET_CONCURRENCY = 8


def preset(name: str, like: Workload) -> Workload:
    """The preset workload `name`; whatever it does not fix is as in `like`."""
    if name not in PRESETS:
        raise WorkloadError(f"no workload {name!r}; there are {', '.join(PRESETS)}")
    shape = PRESETS[name]
    return replace(
        like,
        name=name,
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
        shared_prefix_tokens=shape.shared_prefix_tokens,
        texts=(),
    )


def read_texts(path: Path) -> tuple[str, ...]:
    """Prompts of a file: one JSON string or {"prompt": ...} object per line in `.jsonl`, else one text per line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: {error}") from error
    _check(bool(lines), f"{path}: no prompt in it")
    return (
        tuple(_json_prompt(path, i, line) for i, line in enumerate(lines)) if path.suffix == ".jsonl" else tuple(lines)
    )


def _json_prompt(path: Path, index: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise WorkloadError(f"{path}, prompt {index + 1}: neither a JSON string nor an object with a prompt")
    return text


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise WorkloadError(message)
