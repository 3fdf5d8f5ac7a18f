"""The checkpoint formats of the published training code: which one a checkpoint is, and its configuration.

Formats and facts: github.com/facebookresearch/MemoryMosaics, folders `Library` and `nanoMosaics`. What our model
cannot compute is refused here, by name. Knows nothing of files; tensor names are in `published_weights`.
"""

import math
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any

from model.config import MosaicConfig

# torch.compile puts this in front of every parameter name.
COMPILED_PREFIX = "_orig_mod."

NANO_KEY_LOG_SCALE_MAX = math.log(65535)
"""Bound on log key scales in the first release of nanoMosaics."""
NANO_REVISED_KEY_LOG_SCALE_MAX = 5.0
"""The same in its later revision, whose checkpoints look no different."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message says why in one line."""


class PublishedFormat(StrEnum):
    """The three ways in which the published code names its tensors."""

    LIBRARY = "Library"
    LIBRARY_EFT = "Library (CUDA variant)"
    NANO = "nanoMosaics"


def detect_format(names: Collection[str], training_config: Mapping[str, Any]) -> PublishedFormat:
    """The format of a checkpoint with these tensor names (without prefix) and this `config` entry."""
    model_type = training_config.get("model_type", "mosaic")
    if model_type != "mosaic":
        raise ConversionError(f"model_type is {model_type!r}: a baseline of nanoMosaics, not a Memory Mosaic")
    if any(name.startswith("transformer.") for name in names):
        raise ConversionError("the weights are a GPT baseline's (transformer.*), not a Memory Mosaic's")
    if any(name.startswith("mosaic.") for name in names):
        return PublishedFormat.NANO
    if any(name.startswith("blocks.") for name in names):
        is_eft = any(".leaky_average." in name for name in names)
        return PublishedFormat.LIBRARY_EFT if is_eft else PublishedFormat.LIBRARY
    raise ConversionError(
        f"no tensor name is one of Library's (blocks.*) or nanoMosaics' (mosaic.*); found {summary(names)}"
    )


def published_config(
    layout: PublishedFormat, arguments: Mapping[str, Any], nano_key_log_scale_max: float
) -> MosaicConfig:
    """The configuration that a checkpoint's `model_args` describe.

    ConversionError names the argument that is missing, nonsense, or asks for what our model does not compute.
    """
    if layout is PublishedFormat.NANO:
        return _nano_config(arguments, nano_key_log_scale_max)
    return _library_config(arguments)


def summary(names: Collection[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return (", ".join(ordered[:shown]) or "nothing") + more


def _library_config(arguments: Mapping[str, Any]) -> MosaicConfig:
    _require(arguments, "v_shift", [1])
    _require(arguments, "k_fe_type", ["linearconv"])
    _require(arguments, "k_kernel_size", [1])
    _require(arguments, "v_fe_type", ["lowrlinearconv", "linearconv"])
    _require(arguments, "v_kernel_size", [2])
    attention_only = _require(arguments, "attn_only", [False, True])
    n_embd = _argument(arguments, "n_embd")
    return _config(
        n_embd=n_embd,
        **{name: _argument(arguments, name) for name in ("vocab_size", "n_layer", "n_head", "block_size")},
        pmem_size=0 if attention_only else _argument(arguments, "pmem_size"),
        pmem_count=0 if attention_only else _argument(arguments, "pmem_count"),
        has_persistent=not attention_only,
        key_log_scale_max=5.0,
        persistent_key_log_scale_max=10.0,
        norm_eps=0.0,
        logit_scale=n_embd**-0.5 if isinstance(n_embd, int) and n_embd > 0 else 1.0,
        pre_norm=_argument(arguments, "pre_ln"),
        value_extractor=arguments["v_fe_type"],
        bias=_argument(arguments, "bias"),
        tied=_argument(arguments, "weight_tying"),
    )


def _nano_config(arguments: Mapping[str, Any], key_log_scale_max: float) -> MosaicConfig:
    sizes = ("vocab_size", "n_layer", "n_head", "n_embd", "block_size", "pmem_size", "pmem_count")
    return _config(
        **{name: _argument(arguments, name) for name in sizes},
        has_persistent=True,
        key_log_scale_max=key_log_scale_max,
        persistent_key_log_scale_max=key_log_scale_max,
        norm_eps=1e-10,
        logit_scale=1.0,
        pre_norm=True,
        value_extractor="lowrlinearconv",
        bias=_argument(arguments, "bias"),
        tied=True,
    )


def _config(**fields: Any) -> MosaicConfig:
    try:
        return MosaicConfig(**fields)
    except ValueError as error:
        raise ConversionError(f"model_args describe no model that can be served: {error}") from None


def _argument(arguments: Mapping[str, Any], name: str) -> Any:
    if name not in arguments:
        raise ConversionError(f"model_args lack {name!r}")
    return arguments[name]


def _require(arguments: Mapping[str, Any], name: str, supported: list[Any]) -> Any:
    value = _argument(arguments, name)
    # A bool equals an int, and is none.
    if not any(value == option and type(value) is type(option) for option in supported):
        wanted = " or ".join(map(repr, supported))
        raise ConversionError(f"{name}={value!r} is not supported, only {wanted}")
    return value
