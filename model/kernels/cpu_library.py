"""The C++ library: where it is, and its C interface. Knows no network."""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

FLOAT32, BFLOAT16, FLOAT16, INT8 = 0, 1, 2, 3

REVISION = 3
"""Of the interface and the arithmetic of all paths: to be raised, together with the number in cpu/api.cpp, by whatever
changes what functions take or the bytes that any path gives."""

logger = logging.getLogger(__name__)


class Sizes(Structure):
    """Mirrors `Sizes` of cpu/model.h."""

    _fields_ = (
        *((name, c_int32) for name in ("version", "n_layer", "n_head", "n_embd", "head_dim", "vocab_size")),
        *((name, c_int32) for name in ("pmem_size", "pmem_count", "pre_norm", "has_persistent")),
        *((name, c_int32) for name in ("persistent_size", "short_window", "long_delay")),
        ("norm_eps", c_float),
        ("logit_scale", c_float),
        ("type", c_int32),
    )


class CacheView(Structure):
    """Mirrors `Cache` of cpu/model.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("state", c_void_p),
        ("num_blocks", c_int64),
        ("num_slots", c_int64),
        ("block_size", c_int32),
        ("type", c_int32),
    )


class StepView(Structure):
    """Mirrors `Step` of cpu/model.h."""

    _fields_ = (
        ("num_sequences", c_int32),
        ("num_tokens", c_int32),
        ("max_blocks", c_int32),
        *((name, c_void_p) for name in ("token_ids", "slots", "block_tables", "short_tables")),
        *((name, c_void_p) for name in ("num_computed", "num_new")),
        *((name, c_void_p) for name in ("snapshots", "logit_rows")),
        ("num_logit_rows", c_int32),
        ("logits", c_void_p),
    )


class LogitsView(Structure):
    """Mirrors `Logits` of cpu/sampling.cpp."""

    _fields_ = (("values", c_void_p), ("num_rows", c_int64), ("vocab", c_int64), ("stride", c_int64))


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built, or from sources of another revision."""
    for path in sorted(Path(__file__).parent.glob("_mosaic_cpu*.so")):
        lib = ctypes.CDLL(str(path))
        if is_of_this_revision(lib):
            return _declare(lib)
        logger.warning("%s was built from other sources and is left alone: install the project again", path.name)
    return None


def is_of_this_revision(lib: object) -> bool:
    """Whether a library has what this module declares."""
    revision = getattr(lib, "mosaic_revision", None)
    return revision is not None and revision() == REVISION


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    signatures = {
        "mosaic_path": (c_char_p, [c_char_p]),
        "mosaic_error": (c_char_p, []),
        "mosaic_new": (c_void_p, [POINTER(Sizes), c_char_p, c_int]),
        "mosaic_free": (None, [c_void_p]),
        "mosaic_set_matrix": (c_int, [c_void_p, c_int, c_char_p, c_int, c_void_p, c_void_p, c_int, c_int]),
        "mosaic_set_bytes": (c_int, [c_void_p, c_int, c_char_p, c_int, *[c_void_p] * 3, c_int, c_int]),
        "mosaic_set_vector": (c_int, [c_void_p, c_int, c_char_p, c_void_p, c_int]),
        "mosaic_set_embedding": (None, [c_void_p, c_void_p, c_int]),
        "mosaic_read_rate": (c_double, [c_char_p, c_int]),
        "mosaic_product_rate": (c_double, [c_char_p, c_int, c_int]),
        "mosaic_argmax": (None, [POINTER(LogitsView), c_void_p]),
        "mosaic_draw": (None, [POINTER(LogitsView), c_int64, *[c_void_p] * 7]),
        "mosaic_score": (None, [POINTER(LogitsView), c_void_p, c_int64, *[c_void_p] * 4]),
        "mosaic_step": (c_int, [c_void_p, POINTER(CacheView), POINTER(StepView)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def kernel_path(wanted: str | None = None) -> str | None:
    """Name of the fastest path this processor supports, or of `wanted`; None where there is none."""
    lib = library()
    name = lib.mosaic_path(wanted.encode() if wanted else None) if lib else None
    return name.decode() if name else None


def check(lib: ctypes.CDLL, failed: int) -> None:
    """Raises RuntimeError with the library's own words."""
    if failed:
        raise RuntimeError(lib.mosaic_error().decode())
