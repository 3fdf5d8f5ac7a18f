"""`model.kernels.sampling` by the C++ library: the same tokens, some ten times sooner."""

from __future__ import annotations

from ctypes import Array, byref, c_double, c_int64

import torch
from torch import Tensor

from model.kernels import sampling
from model.kernels.cpu_library import LogitsView, library
from model.kernels.sampling import Draws, Scores


def argmax(logits: Tensor) -> list[int]:
    """See `sampling.argmax`."""
    lib = library()
    if lib is None or not _is_readable(logits):
        return sampling.argmax(logits)
    token_ids = (c_int64 * len(logits))()
    lib.mosaic_argmax(byref(_view(logits)), token_ids)
    return list(token_ids)


def draw(logits: Tensor, draws: Draws) -> list[int]:
    """See `sampling.draw`, which serves where some row has a typical-p."""
    lib = library()
    if lib is None or not _is_readable(logits) or min(draws.typical_p) < 1:
        return sampling.draw(logits, draws)
    token_ids = (c_int64 * len(draws.rows))()
    lib.mosaic_draw(
        byref(_view(logits)),
        len(draws.rows),
        _integers(draws.rows),
        _doubles(draws.temperature),
        _integers(draws.top_k),
        *(_doubles(numbers) for numbers in (draws.top_p, draws.min_p, draws.u)),
        token_ids,
    )
    return list(token_ids)


def score(logits: Tensor, token_ids: list[int], num_top: int) -> Scores:
    """See `sampling.score`."""
    lib = library()
    if lib is None or not _is_readable(logits):
        return sampling.score(logits, token_ids, num_top)
    n = len(token_ids)
    largest, totals, counts = (c_double * n)(), (c_double * n)(), (c_int64 * n)()
    tops = torch.empty(n, num_top, dtype=torch.int64)
    lib.mosaic_score(byref(_view(logits)), _integers(token_ids), num_top, largest, totals, counts, tops.data_ptr())
    return Scores(list(largest), list(totals), list(counts), tops)


def _is_readable(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.stride(-1) == 1


def _view(logits: Tensor) -> LogitsView:
    return LogitsView(logits.data_ptr(), logits.shape[0], logits.shape[1], logits.stride(0))


def _integers(numbers: list[int]) -> Array[c_int64]:
    return (c_int64 * len(numbers))(*numbers)


def _doubles(numbers: list[float]) -> Array[c_double]:
    return (c_double * len(numbers))(*numbers)
