"""A network packed for the C++ library, and one call of it per engine step."""

from __future__ import annotations

import ctypes
import math
import weakref
from array import array
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn

from model.cache import MemoryBatch
from model.config import NetworkConfig
from model.kernels import cpu_library
from model.kernels.cpu_library import CacheView, Sizes, StepView
from model.kernels.kernel import QUANTISED, split_path
from model.kernels.packing_v2 import matrices_v2, sizes_v2, vectors_v2
from model.layers import Block, ContextualMemory, MixedValues, log_decay, scale
from model.mosaic_v1 import MemoryMosaic
from model.mosaic_v2 import BlockV2, MemoryMosaicV2
from model.quantise import quantise

MAX_BLOCK_SIZE, MAX_HEAD_DIM, LANES = 256, 512, 16
"""Mirrors kMaxBlockSize, kMaxDim and kLanes of cpu/memory.inl and cpu/model.h."""

_TYPES = {
    torch.float32: cpu_library.FLOAT32,
    torch.bfloat16: cpu_library.BFLOAT16,
    torch.float16: cpu_library.FLOAT16,
}


def unsupported(config: NetworkConfig, device_type: str, dtype: torch.dtype, block_size: int) -> str | None:
    """Why the library cannot serve such a model with blocks of this size, or None if it can."""
    if device_type != "cpu":
        return "the model is not on the CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"weights of {dtype} are not supported"
    if config.head_dim > MAX_HEAD_DIM:
        return f"heads of {config.head_dim} dimensions are not supported"
    if block_size % LANES or block_size > MAX_BLOCK_SIZE:
        return f"a block size of {block_size} is not a multiple of {LANES} up to {MAX_BLOCK_SIZE}"
    return None


class CpuKernel:
    """Runs steps of `model` by one call into C++ each.

    Every row is computed by the same operations in the same order whatever else is in the batch, however its tokens
    were cut into chunks: equal inputs give equal bytes. Weights are copied; the model may go. Raises RuntimeError
    where the library or a path is missing. One call at a time.

    A `path` that ends in "-int8" quantises the weights, and their inputs step by step, as `model.quantise` does.
    """

    keys_by_dimension = True
    revision = cpu_library.REVISION

    def __init__(self, model: MemoryMosaic | MemoryMosaicV2, *, num_threads: int, path: str | None = None) -> None:
        wanted, self._is_quantised = split_path(path)
        lib, name = cpu_library.library(), cpu_library.kernel_path(wanted)
        if lib is None or name is None:
            raise RuntimeError(f"the CPU kernels {path or ''} are not available here")
        self.path = name + QUANTISED * self._is_quantised
        self._lib, self._vocab_size = lib, model.config.vocab_size
        self._embedding = model.embedding.weight.detach().contiguous()
        sizes = _sizes(model, cpu_library.INT8 if self._is_quantised else _TYPES[model.dtype])
        self._handle = lib.mosaic_new(ctypes.byref(sizes), name.encode(), num_threads)
        if not self._handle:
            raise RuntimeError(lib.mosaic_error().decode())
        self._finalizer = weakref.finalize(self, lib.mosaic_free, self._handle)
        self._pack(model)

    def _pack(self, model: MemoryMosaic | MemoryMosaicV2) -> None:
        head = model.embedding.weight if model.head is None else model.head.get_parameter("weight")
        self._set_matrix(0, "head", 0, head, None)
        self._set_vectors(0, _norm("norm", model.norm))
        self._lib.mosaic_set_embedding(self._handle, self._embedding.data_ptr(), _TYPES[model.dtype])
        for i, block in enumerate(model.blocks):
            if isinstance(block, BlockV2):
                matrices, vectors = matrices_v2(block), vectors_v2(block)
            else:
                assert isinstance(block, Block)
                matrices, vectors = _matrices(block), _vectors(block)
            for name, index, weight, bias in matrices:
                self._set_matrix(i, name, index, weight, bias)
            self._set_vectors(i, vectors)

    def _set_matrix(self, layer: int, name: str, index: int, weight: Tensor, bias: Tensor | None) -> None:
        w = weight.detach().float().contiguous()
        b = None if bias is None else bias.detach().float().contiguous()
        pointer = None if b is None else b.data_ptr()
        place = (self._handle, layer, name.encode(), index)
        if self._is_quantised:
            rows, steps = (part.contiguous() for part in quantise(w))
            failed = self._lib.mosaic_set_bytes(*place, rows.data_ptr(), steps.data_ptr(), pointer, *w.shape)
        else:
            failed = self._lib.mosaic_set_matrix(*place, w.data_ptr(), pointer, *w.shape)
        cpu_library.check(self._lib, failed)

    def _set_vectors(self, layer: int, vectors: Iterator[tuple[str, Tensor]]) -> None:
        for name, vector in vectors:
            v = vector.detach().float().contiguous()
            failed = self._lib.mosaic_set_vector(self._handle, layer, name.encode(), v.data_ptr(), v.numel())
            cpu_library.check(self._lib, failed)

    def step(
        self,
        token_ids: Tensor,
        batch: MemoryBatch,
        *,
        rows: Tensor | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """See `Kernel.step`. Raises RuntimeError, before any work, for ids out of range."""
        cache = batch.cache
        if not cache.keys_by_dimension:
            raise ValueError("the CPU kernels need a cache whose keys lie by dimension")
        # Arrays, because every call into torch offers the interpreter to other threads, which keep it for a while.
        num_new, num_computed = array("i", batch.num_new), array("i", batch.num_computed)
        lasts = [end - 1 for end in accumulate(batch.num_new)]
        wanted = array("i", lasts if rows is None else rows.tolist())
        logits = torch.empty(len(wanted), self._vocab_size)
        tables, slots, ids = batch.block_tables.contiguous(), batch.slots.contiguous(), token_ids.contiguous()
        snapshots, short_tables = (
            None if tensor is None else tensor.contiguous() for tensor in (batch.snapshots, batch.short_tables)
        )
        view = CacheView(
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            state=cache.state.data_ptr(),
            num_blocks=cache.num_blocks,
            num_slots=cache.num_slots,
            block_size=cache.block_size,
            type=_TYPES[cache.keys.dtype],
        )
        step = StepView(
            num_sequences=len(batch.num_new),
            num_tokens=batch.num_tokens,
            max_blocks=tables.shape[1],
            token_ids=ids.data_ptr(),
            slots=slots.data_ptr(),
            block_tables=tables.data_ptr(),
            short_tables=None if short_tables is None else short_tables.data_ptr(),
            num_computed=num_computed.buffer_info()[0],
            num_new=num_new.buffer_info()[0],
            snapshots=None if snapshots is None else snapshots.data_ptr(),
            logit_rows=wanted.buffer_info()[0],
            num_logit_rows=len(wanted),
            logits=logits.data_ptr(),
        )
        on_start()
        cpu_library.check(self._lib, self._lib.mosaic_step(self._handle, ctypes.byref(view), ctypes.byref(step)))
        return logits


def _sizes(model: MemoryMosaic | MemoryMosaicV2, weight_type: int) -> Sizes:
    if isinstance(model, MemoryMosaicV2):
        return Sizes(type=weight_type, **sizes_v2(model.config))
    c = model.config
    return Sizes(
        version=1,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        pmem_size=c.pmem_size,
        pmem_count=c.pmem_count,
        pre_norm=c.pre_norm,
        has_persistent=c.has_persistent,
        norm_eps=c.norm_eps,
        logit_scale=c.logit_scale,
        type=weight_type,
    )


def _matrices(block: Block) -> Iterator[tuple[str, int, Tensor, Tensor | None]]:
    yield "projection", 0, *_projection(block.contextual)
    yield "contextual_output", 0, block.contextual.output.weight, block.contextual.output.bias
    memory = block.persistent
    if memory is None:
        return
    yield "persistent_key", 0, memory.key.projection.weight, memory.key.projection.bias
    yield "persistent_output", 0, memory.output.weight, memory.output.bias
    for index, (keys, values) in enumerate(zip(memory.keys.flatten(0, 1), memory.values.flatten(0, 1), strict=True)):
        yield "persistent_keys", index, keys, None
        yield "persistent_values", index, values.T, None


def _projection(memory: ContextualMemory) -> tuple[Tensor, Tensor | None]:
    """Key and value projections as one matrix, so that one pass over the input serves all."""
    key, value = memory.key.projection, memory.value
    if isinstance(value, MixedValues):
        parts = [key, value.projection]
        return torch.cat([p.weight for p in parts]), _joined([p.bias for p in parts])
    weight = torch.cat([key.weight, value.current.weight, value.next.weight])
    if key.bias is None or value.bias is None:
        return weight, None
    return weight, torch.cat([key.bias, value.bias.to(key.bias.dtype), torch.zeros_like(key.bias)])


def _joined(biases: list[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return torch.cat(present) if present else None


def _vectors(block: Block) -> Iterator[tuple[str, Tensor]]:
    memory = block.contextual
    yield from _norm("contextual_norm", block.contextual_norm)
    yield "decay", _decay(memory.key.leak)
    yield "sharpness", _scale(memory.key.log_scale, 2, 2 * memory.log_scale_max)
    yield "value_scale", _scale(memory.value.log_scale, 1, math.inf)
    if isinstance(memory.value, MixedValues):
        yield "mix", memory.value.mix
    persistent = block.persistent
    if persistent is None or block.persistent_norm is None:
        return
    yield from _norm("persistent_norm", block.persistent_norm)
    yield "persistent_decay", _decay(persistent.key.leak)
    yield "persistent_sharpness", _scale(persistent.key.log_scale, 2, persistent.log_scale_max)
    yield "persistent_scale", _scale(persistent.log_scale, 1, math.inf)


def _decay(leak: Tensor) -> Tensor:
    return log_decay(leak, torch.float32).exp()


def _scale(log_scale: Tensor, power: int, most: float) -> Tensor:
    return scale(log_scale, power, most, torch.float32)


def _norm(name: str, norm: nn.LayerNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", norm.weight
    if norm.bias is not None:
        yield f"{name}.bias", norm.bias
