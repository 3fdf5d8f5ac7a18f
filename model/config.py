"""The sizes and numbers that, with the weights, determine a Memory Mosaic of either version. Free of torch.

The two published training scripts of the first version differ by numbers only (clamps, epsilons, scales), so no field
names a script.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from model.small_files import read_small_text

Architecture = Literal["memory-mosaic-v1", "memory-mosaic-v2"]
ValueExtractorKind = Literal["lowrlinearconv", "linearconv"]

# Upper bounds on what a configuration may ask for: a file from elsewhere must not size our memory at will.
_MAX_SIZES = {
    "vocab_size": 1 << 21,
    "n_layer": 512,
    "n_head": 1 << 10,
    "n_embd": 1 << 16,
    "block_size": 1 << 24,
    "pmem_size": 1 << 20,
    "pmem_count": 1 << 8,
    "persistent_size": 1 << 20,
    "short_window": 1 << 16,
}
_MAX_LOG_SCALE = 80.0  # of a logit: exp(80) is still finite in float32
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """What every version has. `NetworkConfig.load` and `from_dict` give whichever version is described.

    Sizes count tokens (`vocab_size`, `block_size`: the context it was trained on) or numbers per token (`n_embd`).
    Raises ValueError, naming the field, on nonsense.
    """

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    architecture: Architecture
    eos_token_id: int | None = None
    tokenizer_vocab_size: int | None = None
    """Ids from here on are padding of the vocabulary, never to be sampled. None: every id is a token."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
            _check_size(name, getattr(self, name))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: {self.n_embd} cannot be divided among n_head = {self.n_head} heads")
        if self.tokenizer_vocab_size is not None:
            _check_range("tokenizer_vocab_size", self.tokenizer_vocab_size, 1, self.vocab_size)
        if self.eos_token_id is not None:
            _check_range("eos_token_id", self.eos_token_id, 0, self.num_sampled_tokens - 1)

    @property
    def head_dim(self) -> int:
        """Numbers per head in a key or a value."""
        return self.n_embd // self.n_head

    @property
    def num_sampled_tokens(self) -> int:
        """Ids 0 .. this - 1 may be sampled."""
        return self.vocab_size if self.tokenizer_vocab_size is None else self.tokenizer_vocab_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration of these values, of the version they name.

        Raises ValueError on an unknown, a missing or a bad field, and where this class is another version's.
        """
        if not isinstance(values, Mapping):
            raise ValueError("not a JSON object")  # noqa: TRY004 - one error type for every bad file
        version = _version(values)
        if not issubclass(version, cls):
            found = values.get("architecture")
            raise ValueError(f"architecture: {found!r} is not what {cls.__name__} describes")  # noqa: TRY004
        required = {field.name: field.default is MISSING for field in fields(version)}
        if unknown := sorted(set(values) - set(required)):
            raise ValueError(f"unknown field{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}")
        if missing := sorted({name for name, needed in required.items() if needed} - set(values)):
            raise ValueError(f"missing field{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}")
        return version(**values)

    def to_json(self) -> str:
        """Canonical JSON: equal configurations give equal text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the JSON file `path`, as `from_dict`.

        Raises OSError if it cannot be read, and ValueError, naming it, if it holds no such configuration.
        """
        try:
            return cls.from_dict(json.loads(read_small_text(path, _MAX_FILE_BYTES)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class MosaicConfig(NetworkConfig):
    """A Memory Mosaic of the first version. Every numeric field that changes a logit has to be given.

    `pmem_count` banks of `pmem_size` pairs per head are its persistent memory.
    """

    pmem_size: int
    pmem_count: int
    key_log_scale_max: float
    """The contextual memory scales its keys by exp(min(10 * log_scale, this)), a logit by the square of that."""
    persistent_key_log_scale_max: float
    """The persistent memory scales its logits by exp(min(20 * log_scale, this))."""
    norm_eps: float
    """Added to the norm that keys and values are divided by."""
    logit_scale: float
    """Factor of the final logits, 1/sqrt(n_embd) or 1."""
    pre_norm: bool
    """x + f(norm(x)) if true, else norm(x) + f(norm(x))."""
    value_extractor: ValueExtractorKind
    bias: bool
    tied: bool
    """The output head uses the embedding's weights."""
    has_persistent: bool
    """False: blocks of contextual memory alone (`attn_only` in the published code)."""
    architecture: Architecture = "memory-mosaic-v1"

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)  # not super(): classes with slots are made twice
        _check_architecture(self.architecture, "memory-mosaic-v1")
        for name in ("pmem_size", "pmem_count"):
            _check_size(name, getattr(self, name), least=1 if self.has_persistent else 0)
        _check_range("key_log_scale_max", self.key_log_scale_max, -_MAX_LOG_SCALE / 2, _MAX_LOG_SCALE / 2)
        _check_range("persistent_key_log_scale_max", self.persistent_key_log_scale_max, -_MAX_LOG_SCALE, _MAX_LOG_SCALE)
        _check_range("norm_eps", self.norm_eps, 0.0, 1.0)
        _check_range("logit_scale", abs(self.logit_scale), 1e-9, 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class MosaicV2Config(NetworkConfig):
    """A Memory Mosaic of the second version ("at Scale").

    A token reads the `short_window - 1` pairs before it from its short-term memory, and those at least `long_delay`
    tokens back from its long-term memory. The delay is at most the window, so that no pair is in neither.
    """

    persistent_size: int
    """Width between the matrices of the persistent memory."""
    short_window: int = 256
    long_delay: int = 64
    """The delay when serving; training draws delays from this one to `max_train_delay`."""
    max_train_delay: int = 256
    architecture: Architecture = "memory-mosaic-v2"

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        _check_architecture(self.architecture, "memory-mosaic-v2")
        if self.head_dim < 2:
            raise ValueError(f"n_head: a key of one number has no direction, and n_embd = {self.n_embd} gives no more")
        _check_size("persistent_size", self.persistent_size)
        _check_size("short_window", self.short_window, least=2)
        _check_range("max_train_delay", self.max_train_delay, 1, self.short_window)
        _check_range("long_delay", self.long_delay, 1, self.max_train_delay)


_VERSIONS: dict[object, type[NetworkConfig]] = {"memory-mosaic-v1": MosaicConfig, "memory-mosaic-v2": MosaicV2Config}


def _version(values: Mapping[str, Any]) -> type[NetworkConfig]:
    """The class that a configuration's values belong to; the first version where they name none that is known."""
    name = values.get("architecture")
    return _VERSIONS.get(name, MosaicConfig) if isinstance(name, str) else MosaicConfig


_LITERALS = {"Architecture": get_args(Architecture), "ValueExtractorKind": get_args(ValueExtractorKind)}


def _check_type(name: str, annotation: str, value: object) -> None:
    if annotation in _LITERALS:
        if value not in _LITERALS[annotation]:
            raise ValueError(f"{name}: expected one of {', '.join(_LITERALS[annotation])}, got {value!r}")
        return
    if value is None and annotation.endswith("| None"):
        return
    kind = annotation.removesuffix(" | None")
    is_number = isinstance(value, int) and not isinstance(value, bool)
    accepted = {
        "bool": isinstance(value, bool),
        "int": is_number,
        "float": is_number or (isinstance(value, float) and math.isfinite(value)),
    }
    if not accepted[kind]:
        raise ValueError(f"{name}: expected {kind}, got {value!r}")


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number from {least:g} to {most:g}, got {value!r}")


def _check_size(name: str, value: int, least: int = 1) -> None:
    _check_range(name, value, least, _MAX_SIZES[name])


def _check_architecture(value: Architecture, expected: Architecture) -> None:
    if value != expected:
        raise ValueError(f"architecture: expected {expected}, got {value}")
