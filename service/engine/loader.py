"""From an `EngineConfig` to an engine ready to start: loads the checkpoint, sizes and allocates its memory."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import torch

from model.cache import LOOK_AHEAD, MemoryCache
from model.checkpoint import load_model
from model.config import MosaicV2Config, NetworkConfig
from model.fingerprint import require_fingerprint, tokenizer_digest
from model.kernels.choice import choose_path, is_fast_in_bfloat16, make_kernel
from model.kernels.kernel import TorchKernel
from model.tokenizer import TOKENIZER_FILE, Tokenizer
from service.config import EngineConfig
from service.engine.async_engine import AsyncEngine
from service.engine.block_manager import BlockManager
from service.engine.constraints import Constraints
from service.engine.engine import Engine
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.memory_plan import MemoryPlan, plan_memory
from service.engine.runner import ModelRunner
from service.engine.scheduler import Scheduler, SchedulerConfig
from service.engine.short_term import ShortTermBlocks
from service.engine.stats import EngineInfo
from service.engine.traced import tracing_to


def load_engine(config: EngineConfig, *, replica: str = "0") -> AsyncEngine:
    """Loads the checkpoint and allocates the memory cache. Blocks.

    Raises FileNotFoundError or ValueError for a missing or unusable checkpoint or device, MemoryError when the cache
    does not fit.
    """
    watch = _StopWatch()
    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    dtype, memory_dtype = resolve_dtypes(config)
    model = load_model(Path(config.model_dir), device=config.device, dtype=dtype)
    require_fingerprint(config.model_dir, model.fingerprint, config.fingerprint)
    watch.lap("weights")
    state_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    memory = plan_memory(config, model.config, memory_dtype, state_dtype)
    num_parameters = model.num_parameters
    kernel = make_kernel(model, kernel_path_of(config, model.config), num_threads=num_threads)
    watch.lap("kernel")
    # Beside kernels with threads of their own torch only samples: its threads, spinning, would take their cores.
    torch.set_num_threads(num_threads if isinstance(kernel, TorchKernel) else 1)
    blocks = BlockManager(
        memory.num_blocks,
        config.block_size,
        memory.num_slots,
        look_ahead=LOOK_AHEAD,
        has_prefix_cache=config.prefix_cache,
        short_term=_short_term(model.config, memory, config.block_size),
        num_swap_blocks=memory.num_swap_blocks,
    )
    make_cache = partial(
        MemoryCache,
        model.config,
        block_size=config.block_size,
        memory_dtype=memory_dtype,
        state_dtype=state_dtype,
        keys_by_dimension=kernel.keys_by_dimension,
    )
    cache = make_cache(
        num_blocks=memory.num_blocks + memory.num_short_blocks,
        num_slots=blocks.num_slots + blocks.prefix_cache.num_slots,
        device=config.device,
    )
    num_places = memory.num_swap_blocks
    swap = make_cache(num_blocks=num_places, num_slots=num_places, device="cpu") if num_places else None
    watch.lap("memory")
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=memory.max_model_len,
            vocab_size=model.config.vocab_size,
            eos_token_id=model.config.eos_token_id,
        ),
        blocks,
    )
    names = [str(t).removeprefix("torch.") for t in (dtype, memory_dtype)]
    info = EngineInfo(
        model_dir=config.model_dir,
        vocab_size=model.config.vocab_size,
        max_model_len=memory.max_model_len,
        eos_token_id=model.config.eos_token_id,
        dtype=names[0],
        memory_dtype=names[1],
        device=config.device,
        kernel_path=kernel.path,
        kernel_revision=kernel.revision,
        fingerprint="-".join([model.fingerprint[:12], *names, kernel.path]),
        num_parameters=num_parameters,
        max_num_requests=config.max_num_seqs + config.max_num_waiting,
        max_num_waiting_tokens=config.max_num_waiting_tokens,
        tokenizer=tokenizer_digest(config.model_dir),
    )
    grammars = _grammar_compiler(Path(config.model_dir), model.config.num_sampled_tokens)
    constraints = Constraints(grammars, model.config.eos_token_id) if grammars else None
    return AsyncEngine(
        Engine(scheduler, ModelRunner(kernel, cache, model.config, constraints, swap)),
        info,
        grammars=grammars,
        stall_timeout_s=config.stall_timeout_s,
        replica=replica,
        start_up=tuple(watch.laps),
        on_traced_end=tracing_to(config.trace_endpoint, replica),
    )


class _StopWatch:
    """How long each of several things took that were done one after the other."""

    def __init__(self) -> None:
        self.laps: list[tuple[str, float]] = []
        self._last_s = time.monotonic()

    def lap(self, name: str) -> None:
        now_s = time.monotonic()
        self.laps.append((name, now_s - self._last_s))
        self._last_s = now_s


def _short_term(model: NetworkConfig, memory: MemoryPlan, block_size: int) -> ShortTermBlocks | None:
    """Their blocks come after the others in the same cache."""
    if not isinstance(model, MosaicV2Config):
        return None
    return ShortTermBlocks(memory.num_blocks, memory.num_short_blocks, block_size, model.short_window - 1)


def _grammar_compiler(model_dir: Path, num_ids: int) -> GrammarCompiler | None:
    """For the first `num_ids` tokens of the model's tokenizer; None where it has none."""
    if not (model_dir / TOKENIZER_FILE).exists():
        return None

    def read_tokens() -> list[bytes]:
        tokenizer = Tokenizer.from_file(model_dir / TOKENIZER_FILE)
        return [tokenizer.token_bytes(token_id) for token_id in range(num_ids)]

    return GrammarCompiler(read_tokens)


def kernel_path_of(config: EngineConfig, model: NetworkConfig) -> str:
    """The name of the arithmetic that serves `config`: output bytes are the same on one path, never promised across."""
    dtype, _ = resolve_dtypes(config)
    return choose_path(
        model,
        config.kernel,
        device=config.device,
        dtype=dtype,
        block_size=config.block_size,
        quantization=config.quantization,
    )


def resolve_dtypes(config: EngineConfig) -> tuple[torch.dtype, torch.dtype]:
    """The types of weights and of stored pairs.

    "auto" weights are bfloat16 where that is fast (GPUs, CPUs with AVX2) and float32 elsewhere. "auto" pairs
    are float32 beside float32 weights and float16 otherwise: stored keys and values have unit norm, where float16 is
    eight times finer than bfloat16, and the kernel's sharpness (a logit scale of 100 and more) turns key rounding into
    logit error. Weights that are quantised are loaded as float32.
    """
    is_quantised = config.quantization != "none"
    is_fast = not is_quantised and is_fast_in_bfloat16(config.device, config.kernel)
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if is_fast else "float32")
    dtype: torch.dtype = getattr(torch, name)
    if config.memory_dtype != "auto":
        return dtype, getattr(torch, config.memory_dtype)
    return dtype, torch.float32 if dtype is torch.float32 and not is_quantised else torch.float16
