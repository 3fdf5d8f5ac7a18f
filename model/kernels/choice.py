"""Which kernel serves a model here."""

from __future__ import annotations

import logging

import torch

from model.config import NetworkConfig
from model.kernels.cpu_kernel import CpuKernel, unsupported
from model.kernels.cpu_library import kernel_path
from model.kernels.kernel import QUANTISED, Kernel, TorchKernel, split_path
from model.mosaic_v1 import MemoryMosaic
from model.mosaic_v2 import MemoryMosaicV2
from model.network import MosaicNetwork

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("none", "int8")
KERNELS = ("auto", "torch", "avx512bf16", "avx2", "generic")
# Paths that lose no time by bfloat16 weights: they multiply them as they are, or widen them beside the products, and
# read half the bytes.
FAST_IN_BFLOAT16 = ("avx512bf16", "avx2")


def is_fast_in_bfloat16(device: str | torch.device, wanted: str = "auto") -> bool:
    """Whether bfloat16 weights are the fast ones: on a GPU, and on CPUs whose path is one of `FAST_IN_BFLOAT16`."""
    if torch.device(device).type != "cpu":
        return True
    return wanted != "torch" and kernel_path(None if wanted == "auto" else wanted) in FAST_IN_BFLOAT16


def choose_path(
    config: NetworkConfig,
    wanted: str = "auto",
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    block_size: int,
    quantization: str = "none",
) -> str:
    """Name of the fastest kernel for such a model on this machine, or `wanted` itself; "-int8" behind it if quantised.

    "auto" falls back to torch; on a CPU with one log line that says why. Raises ValueError when `wanted` is unknown or
    cannot serve such a model here.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization: expected one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    path = _float_path(config, wanted, torch.device(device).type, dtype, block_size)
    return path if quantization == "none" else path + QUANTISED


def _float_path(config: NetworkConfig, wanted: str, device_type: str, dtype: torch.dtype, block_size: int) -> str:
    if wanted not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {wanted!r}")
    torch_path = f"torch-{device_type}"
    if wanted == "torch":
        return torch_path
    path = kernel_path(None if wanted == "auto" else wanted)
    reason = unsupported(config, device_type, dtype, block_size)
    if reason is None and path is None:
        reason = f"this processor does not support {wanted}" if kernel_path() else "they were not built"
    if reason is None and path is not None:
        return path
    if wanted != "auto":
        raise ValueError(f"kernel: {wanted} cannot serve this model here: {reason}")
    if device_type == "cpu":
        logger.warning("the CPU kernels are not used: %s; plain torch serves instead, several times slower", reason)
    return torch_path


def make_kernel(model: MosaicNetwork, path: str, *, num_threads: int) -> Kernel:
    """The kernel that `choose_path` named. The model is its own from then on."""
    if path.startswith("torch-"):
        return TorchKernel(model, is_quantised=split_path(path)[1])
    assert isinstance(model, MemoryMosaic | MemoryMosaicV2)
    return CpuKernel(model, num_threads=num_threads, path=path)
