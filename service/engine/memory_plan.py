"""How many blocks and slots fit: from a config, a model and the memory of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from model.cache import LOOK_AHEAD, MemoryCache
from model.config import MosaicV2Config, NetworkConfig
from service.config import EngineConfig
from service.engine.short_term import ShortTermBlocks, short_blocks_of_window

# Of what is available when nobody says how much: the weights of other replicas and the clients need room too.
_DEFAULT_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of a memory cache. `num_bytes` covers blocks, slots and snapshots."""

    max_model_len: int
    num_blocks: int
    num_slots: int
    num_snapshots: int
    num_bytes: int
    num_short_blocks: int = 0
    """Beside the others, in a network with a short-term memory."""
    num_swap_blocks: int = 0
    """Each with its snapshot, in a pool of their own beside `num_bytes`."""


def plan_memory(
    config: EngineConfig, model: NetworkConfig, memory_dtype: torch.dtype, state_dtype: torch.dtype
) -> MemoryPlan:
    """Resolves the open sizes of `config`. Raises MemoryError when not even one full sequence fits."""
    max_model_len = config.max_model_len or model.block_size
    block_bytes = MemoryCache.block_bytes(model, config.block_size, memory_dtype)
    slot_bytes = MemoryCache.slot_bytes(model, state_dtype)
    fixed_bytes = config.max_num_seqs * slot_bytes
    if config.prefix_cache:
        # A snapshot for each block, and as many within blocks as there are sequences: see `PrefixCache`.
        block_bytes += slot_bytes
        fixed_bytes *= 2
    per_sequence = -(-(max_model_len - LOOK_AHEAD) // config.block_size)
    num_short_blocks = _num_short_blocks(config, model, per_sequence)
    fixed_bytes += num_short_blocks * MemoryCache.block_bytes(model, config.block_size, memory_dtype)
    wanted = per_sequence * config.max_num_seqs
    available = available_bytes(config.device)
    budget = config.memory_bytes or int(available * _DEFAULT_SHARE)
    if budget > available:
        # The system promises more memory than it has, and would kill the process while it takes it.
        raise MemoryError(f"the memory cache is to take {_size(budget)}, but {_size(available)} are available")
    num_blocks = (budget - fixed_bytes) // block_bytes
    if config.memory_bytes is None:
        num_blocks = min(num_blocks, wanted)
    if num_blocks < per_sequence:
        needed = per_sequence * block_bytes + fixed_bytes
        raise MemoryError(
            f"the memory cache may take {_size(budget)}, but one sequence of {max_model_len} tokens and "
            f"{config.max_num_seqs} state slots need {_size(needed)}: lower max_model_len or max_num_seqs, or "
            "give it more memory"
        )
    num_blocks = max(num_blocks, 1)
    num_snapshots = num_blocks + config.max_num_seqs if config.prefix_cache else 0
    num_bytes = num_blocks * block_bytes + fixed_bytes
    return MemoryPlan(
        max_model_len,
        num_blocks,
        config.max_num_seqs,
        num_snapshots,
        num_bytes,
        num_short_blocks,
        _num_swap_blocks(config, model, block_bytes, num_bytes),
    )


def _num_swap_blocks(config: EngineConfig, model: NetworkConfig, block_bytes: int, num_bytes: int) -> int:
    """Blocks of `block_bytes` in the pool to swap into. Raises MemoryError where it does not fit beside the cache."""
    if config.swap_bytes is None:
        return 0
    if isinstance(model, MosaicV2Config):
        raise ValueError("swap_memory cannot be used with this model: its short-term memory does not swap")  # noqa: TRY004
    available = available_bytes("cpu") - (num_bytes if torch.device(config.device).type == "cpu" else 0)
    if not block_bytes <= config.swap_bytes <= available:
        raise MemoryError(
            f"swap_memory is {_size(config.swap_bytes)}: it must be at least {_size(block_bytes)}, one block, and at "
            f"most {_size(available)}, which is available"
        )
    return config.swap_bytes // block_bytes


def window_bytes(config: EngineConfig, model: NetworkConfig, memory_dtype: torch.dtype) -> int:
    """Bytes of the short-term memory that one sequence holds at most between two steps."""
    if not isinstance(model, MosaicV2Config):
        return 0
    num_blocks = short_blocks_of_window(model.short_window - 1, config.block_size)
    return num_blocks * MemoryCache.block_bytes(model, config.block_size, memory_dtype)


def _num_short_blocks(config: EngineConfig, model: NetworkConfig, per_sequence: int) -> int:
    """Enough for the windows of all sequences; with a prefix cache as many again, to go on from texts that ended."""
    if not isinstance(model, MosaicV2Config):
        return 0
    needed = ShortTermBlocks.num_needed(
        model.short_window - 1,
        config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    return min(needed, config.max_num_seqs * per_sequence) * (2 if config.prefix_cache else 1)


def available_bytes(device: str) -> int:
    """Memory that could be taken now, in bytes: of the GPU, or of this machine or its container."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return min(_meminfo_available(), _cgroup_available())


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _cgroup_available() -> int:
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), (root / "memory.current").read_text()
        return _meminfo_available() if limit == "max" else int(limit) - int(used)
    except OSError:
        return _meminfo_available()


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{max(num_bytes, 0) / 2**10:.4g} KiB"
    return f"{-(-num_bytes // 2**20)} MiB"
