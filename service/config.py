"""What an engine is told when it starts. Frozen and picklable, so that it can travel to a replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8"]
Routing = Literal["prefix", "least-loaded"]
KernelName = Literal["auto", "torch", "avx512bf16", "avx2", "generic"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine replica.

    `None` and "auto" are resolved against the checkpoint and the machine when the engine loads:
    `max_model_len` becomes the trained context, `memory_bytes` what `max_num_seqs` full sequences need (at most 40% of
    the memory available), `num_threads` the cores of this process. `trace_endpoint` is where spans go, if anywhere.
    `fingerprint` is what that of the checkpoint has to begin with.
    """

    model_dir: str
    device: str = "cpu"
    dtype: DType = "auto"
    memory_dtype: DType = "auto"
    quantization: Quantization = "none"
    kernel: KernelName = "auto"
    num_threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    block_size: int = 32
    memory_bytes: int | None = None
    prefix_cache: bool = True
    swap_bytes: int | None = None
    max_num_waiting: int = 256
    max_num_waiting_tokens: int = 262_144
    stall_timeout_s: float = 60.0
    trace_endpoint: str | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_num_waiting_tokens"):
            _require_positive(name, getattr(self, name))
        for name in ("num_threads", "max_model_len", "memory_bytes", "swap_bytes"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.max_num_waiting < 0:
            raise ValueError(f"max_num_waiting must be 0 or more, got {self.max_num_waiting}")
        if self.stall_timeout_s <= 0:
            raise ValueError(f"stall_timeout_s must be positive, got {self.stall_timeout_s}")
        if self.swap_bytes and not self.prefix_cache:
            raise ValueError("swap_memory keeps what the prefix cache has no room for: it needs prefix_cache")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
