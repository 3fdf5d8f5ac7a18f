"""Engines without a network for replicas in other processes: real scheduling, scripted tokens, a set pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from service.config import EngineConfig
from service.engine.async_engine import AsyncEngine
from service.engine.engine import Engine
from service.engine.stats import EngineInfo
from service.engine.step import SchedulerOutput, StepOutput
from service.engine.traced import tracing_to
from service.errors import NoMemoryError
from tests.engine.scripted import VOCAB_SIZE, ScriptedRunner, make_scheduler

if TYPE_CHECKING:  # Ray reads its settings when imported: not before the cluster is started.
    from ray.serve.handle import DeploymentHandle

    from service.ray_engine import EngineReplica, ServedEngine

MAX_MODEL_LEN = 4096
POISON = 49
"""A prompt that starts with this token makes the engine's step raise."""
STALL = 48
"""A prompt that starts with this token makes the engine's step never end."""


class PacedRunner(ScriptedRunner):
    """Takes `step_s` for a step, and misbehaves when told to."""

    def __init__(self, step_s: float, block_size: int) -> None:
        super().__init__(block_size, lambda: time.sleep(step_s))

    def execute(self, plan: SchedulerOutput, on_start: Callable[[], None] = lambda: None) -> StepOutput:
        firsts = {item.sequence.token_ids[0] for item in plan.scheduled}
        if POISON in firsts:
            raise RuntimeError("a poisoned prompt")
        if STALL in firsts:
            time.sleep(3600)
        return super().execute(plan, on_start)


def load_paced(config: EngineConfig, replica: str, step_s: float = 0.002) -> ServedEngine:
    """An engine with the limits of `config`."""
    scheduler = make_scheduler(
        num_blocks=1024,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        clock=time.monotonic,
    )
    info = EngineInfo(
        model_dir=config.model_dir,
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        eos_token_id=0,
        dtype="float32",
        memory_dtype="float32",
        device="cpu",
        kernel_path="scripted",
        fingerprint="0123456789ab",
        num_parameters=1,
        max_num_requests=config.max_num_seqs + config.max_num_waiting,
    )
    return AsyncEngine(
        Engine(scheduler, PacedRunner(step_s, config.block_size)),
        info,
        stall_timeout_s=config.stall_timeout_s,
        replica=replica,
        on_traced_end=tracing_to(config.trace_endpoint, replica),
    )


def load_other(config: EngineConfig, replica: str, step_s: float = 0.002) -> ServedEngine:
    """The same, as if it had another checkpoint."""
    engine = load_paced(config, replica, step_s)
    engine.info = replace(engine.info, fingerprint="ba9876543210")
    return engine


def load_with_tokenizer(config: EngineConfig, replica: str, tokenizer: str) -> ServedEngine:
    """The same, as if its tokenizer had that digest."""
    engine = load_paced(config, replica)
    engine.info = replace(engine.info, tokenizer=tokenizer)
    return engine


def load_too_much(config: EngineConfig, replica: str) -> ServedEngine:
    """What a memory cache does that does not fit."""
    raise NoMemoryError("not enough memory: it needs 4 TiB, but 1 GiB are available")


def load_with_a_bug(config: EngineConfig, replica: str) -> ServedEngine:
    """What nobody has foreseen."""
    raise KeyError("weights")


def engine_of(app: str) -> DeploymentHandle[EngineReplica]:
    """The engines of an application that runs."""
    from ray import serve

    return serve.get_deployment_handle("Engine", app)
