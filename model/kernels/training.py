"""Training's arithmetic by the C++ library, with gradients: float32 on a CPU. `model.arithmetic` is the reference.

Reads are computed in blocks of logits that stay in the processor's cache: neither forwards nor backwards is there a
matrix of all of them in memory. Logits are always of float32 products; under bfloat16 autocast the other products
round their factors to bfloat16 where the processor multiplies those (AVX-512 with bfloat16), and else, with AVX2, stay
in float32 too. On other processors torch does it.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu_library import library


class _View(Structure):
    """Mirrors `View` of cpu/training.h."""

    _fields_ = (("data", c_void_p), *((f"{name}_stride", c_int64) for name in ("batch", "row", "head")))


class _Smoothing(Structure):
    """Mirrors `Smoothing` of cpu/training.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batches", "heads", "queries", "pairs", "dim", "causal", "narrow")),
        *((name, _View) for name in ("query", "key", "value", "output")),
        ("log_sum", c_void_p),
        *((f"{name}_gradient", _View) for name in ("output", "query", "key", "value")),
    )


class _Averaging(Structure):
    """Mirrors `Averaging` of cpu/training.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batches", "heads", "time", "dim")),
        ("decay", c_void_p),
        *((name, _View) for name in ("input", "output", "output_gradient", "input_gradient")),
        ("decay_gradient", c_void_p),
    )


class _Normalising(Structure):
    """Mirrors `Normalising` of cpu/training.h."""

    _fields_ = (
        ("rows", c_int64),
        ("dim", c_int64),
        ("eps", c_float),
        *((name, c_void_p) for name in ("input", "output", "scale", "output_gradient", "input_gradient")),
    )


def trains(*tensors: Tensor) -> bool:
    """Whether these are to be computed here: float32 on a CPU that can, and a gradient is wanted."""
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and is_supported()
    )


def smooth(queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> Tensor:
    """As `arithmetic.read` without a mask."""
    y: Tensor = _Smooth.apply(queries, keys, values, causal)  # type: ignore[no-untyped-call]
    return y


def average(x: Tensor, log_decay: Tensor) -> Tensor:
    """As `arithmetic.leaky_average`."""
    y: Tensor = _Average.apply(x, torch.exp(log_decay))  # type: ignore[no-untyped-call]
    return y


def normalise(x: Tensor, eps: float) -> Tensor:
    """As `arithmetic.unit`."""
    y: Tensor = _Normalise.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
        queries, keys, values = (_rows_in_memory(x) for x in (queries, keys, values))
        output, log_sum = _token_major(queries), queries.new_empty(queries.shape[:3])
        ctx.save_for_backward(queries, keys, values, output, log_sum)
        ctx.flags = causal, _is_narrow()
        _call("mosaic_smooth", 0, _smoothing(queries, keys, values, output, log_sum, *ctx.flags))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, output, log_sum = ctx.saved_tensors
        gradient, gradients = _rows_in_memory(gradient), [_token_major(x) for x in (queries, keys, values)]
        smoothing = _smoothing(queries, keys, values, output, log_sum, *ctx.flags)
        smoothing.output_gradient = _heads_first(gradient)
        smoothing.query_gradient, smoothing.key_gradient, smoothing.value_gradient = map(_heads_first, gradients)
        _call("mosaic_smooth", 1, smoothing)
        return gradients[0], gradients[1], gradients[2], None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        x, decay = _rows_in_memory(x), decay.contiguous()
        y = torch.empty(x.shape)
        ctx.save_for_backward(decay, y)
        averaging = _averaging(decay, y)
        averaging.input = _time_first(x)
        _call("mosaic_average", 0, averaging)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        decay, y = ctx.saved_tensors
        gradient, x = _rows_in_memory(gradient), torch.empty(y.shape)
        slopes = torch.empty(y.shape[0], y.shape[2])
        averaging = _averaging(decay, y)
        averaging.output_gradient, averaging.input_gradient = _time_first(gradient), _time_first(x)
        averaging.decay_gradient = slopes.data_ptr()
        _call("mosaic_average", 1, averaging)
        return x, slopes.sum(0)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, scale = torch.empty(x.shape), torch.empty(x.shape[:-1])
        ctx.save_for_backward(y, scale)
        # The zero vector stays zero, also for eps = 0.
        eps = max(eps, torch.finfo(torch.float32).tiny)
        normalising = _Normalising(scale.numel(), x.shape[-1], eps, x.data_ptr(), y.data_ptr(), scale.data_ptr())
        _call("mosaic_normalise", 0, normalising)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        gradient, x = gradient.contiguous(), torch.empty(y.shape)
        pointers = (tensor.data_ptr() for tensor in (y, scale, gradient, x))
        _call("mosaic_normalise", 1, _Normalising(scale.numel(), y.shape[-1], 0.0, None, *pointers))
        return x, None


def _smoothing(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor, causal: bool, narrow: bool
) -> _Smoothing:
    batches, heads, queries, dim = q.shape
    views = map(_heads_first, (q, k, v, output))
    return _Smoothing(batches, heads, queries, k.shape[2], dim, causal, narrow, *views, log_sum.data_ptr())


def _is_narrow() -> bool:
    return narrows() and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def _averaging(decay: Tensor, output: Tensor) -> _Averaging:
    batches, time, heads, dim = output.shape
    averaging = _Averaging(batches, heads, time, dim, decay.data_ptr())
    averaging.output = _time_first(output)
    return averaging


def _heads_first(x: Tensor) -> _View:
    """Of [batch, heads, rows, dim]."""
    return _View(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1))


def _time_first(x: Tensor) -> _View:
    """Of [batch, rows, heads, dim]."""
    return _View(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _token_major(like: Tensor) -> Tensor:
    """An empty [batch, heads, rows, dim], whose heads lie beside each other, as projections give and take them."""
    batch, heads, rows, dim = like.shape
    return like.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _rows_in_memory(x: Tensor) -> Tensor:
    """The same numbers, with those of the last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def is_supported() -> bool:
    """Whether the library was built and this processor is one that it computes for."""
    return _path() is not None


def narrows() -> bool:
    """Whether this processor has products of bfloat16 to compute with under autocast."""
    return _path() == b"avx512bf16"


@cache
def _path() -> bytes | None:
    """The instruction set that the library trains with."""
    lib = library()
    if lib is None or not hasattr(lib, "mosaic_training_path"):
        return None
    for name in ("mosaic_smooth", "mosaic_average", "mosaic_normalise"):
        function = getattr(lib, name)
        function.restype, function.argtypes = c_int, [c_int, c_int, c_void_p]
    lib.mosaic_training_path.restype = c_char_p
    path: bytes | None = lib.mosaic_training_path()
    return path


def _call(name: str, backward: int, work: Structure) -> None:
    if getattr(library(), name)(torch.get_num_threads(), backward, byref(work)):
        raise RuntimeError("this processor has no training kernels")
