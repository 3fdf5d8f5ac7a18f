"""What a model directory holds and how much of it fits here. Reads the configuration, not the weights."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from model.cache import MemoryCache
from model.checkpoint import expected_shapes
from model.config import NetworkConfig
from model.fingerprint import CONFIG_FILE
from model.tokenizer import TOKENIZER_FILE
from service.config import EngineConfig
from service.engine.loader import kernel_path_of, resolve_dtypes
from service.engine.memory_plan import available_bytes, plan_memory, window_bytes
from service.settings import ServeSettings
from service.startup import explained, require_device, require_model
from service.version import package_version

Facts = dict[str, dict[str, Any]]


def describe(settings: ServeSettings) -> Facts:
    """Facts by group; sizes in bytes. Raises CommandError where `tessera serve` would, as far as that is known."""
    require_model(settings.model)
    config = settings.engine_config()
    require_device(config.device)
    with explained():
        model = NetworkConfig.load(settings.model / CONFIG_FILE)
        return {
            "model": _model_facts(settings.model, model),
            "memory": _memory_facts(config, model),
            "runtime": _runtime_facts(config, model),
        }


def _model_facts(directory: Path, model: NetworkConfig) -> dict[str, Any]:
    return {
        "directory": str(directory.resolve()),
        "parameters": sum(math.prod(shape) for shape in expected_shapes(model).values()),
        "has_tokenizer": (directory / TOKENIZER_FILE).is_file(),
        **model.to_dict(),
    }


def _memory_facts(config: EngineConfig, model: NetworkConfig) -> dict[str, Any]:
    dtype, memory_dtype = resolve_dtypes(config)
    state_dtype = torch.float32
    plan = plan_memory(config, model, memory_dtype, state_dtype)
    slot_bytes = MemoryCache.slot_bytes(model, state_dtype)
    num_pairs = plan.num_blocks * config.block_size
    # A sequence of n tokens holds n - 1 pairs.
    full_sequences = plan.num_blocks // max(1, -(-(plan.max_model_len - 1) // config.block_size))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "memory_dtype": str(memory_dtype).removeprefix("torch."),
        "bytes_per_token": MemoryCache.block_bytes(model, 1, memory_dtype),
        "bytes_per_sequence": slot_bytes + window_bytes(config, model, memory_dtype),
        "prefix_cache": config.prefix_cache,
        "snapshot_bytes": plan.num_snapshots * slot_bytes,
        "swap_bytes": plan.num_swap_blocks
        * (MemoryCache.block_bytes(model, config.block_size, memory_dtype) + slot_bytes),
        "cache_bytes": plan.num_bytes,
        "available_bytes": available_bytes(config.device),
        "cache_tokens": num_pairs,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "full_sequences": min(full_sequences, config.max_num_seqs),
    }


def _runtime_facts(config: EngineConfig, model: NetworkConfig) -> dict[str, Any]:
    return {
        "device": config.device,
        "kernel_path": kernel_path_of(config, model),
        "threads": config.num_threads or len(os.sched_getaffinity(0)),
        "tessera": package_version(),
        "torch": torch.__version__,
        "ray": version("ray"),
        "python": platform.python_version(),
    }


def print_json(facts: Facts) -> None:
    """One JSON object on stdout."""
    print(json.dumps(facts, indent=2))


def print_table(facts: Facts) -> None:
    """For a person: groups and aligned names, sizes in binary units."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for group, values in facts.items():
        table.add_row(f"[bold]{group}[/bold]")
        for name, value in values.items():
            table.add_row(f"  {name.replace('_', ' ')}", _readable(name, value))
    # Into a pipe goes all of every line: a path cut short is of no use to the next program.
    width = None if sys.stdout.isatty() else 1000
    Console(soft_wrap=True, width=width).print(table, markup=True, highlight=False)


def _readable(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in name:
        return _with_unit(value)
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return str(value)


def _with_unit(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
