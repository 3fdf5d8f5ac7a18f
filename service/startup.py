"""Turns what goes wrong while an engine starts into one line and an exit code, before the slow part where possible."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from model.fingerprint import CONFIG_FILE, WEIGHTS_FILE, tokenizer_digest
from model.tokenizer import Tokenizer
from service.config import EngineConfig
from service.engine.async_engine import AsyncEngine
from service.engine.stats import EngineInfo
from service.errors import CommandError, EngineStartError, ModelNotFoundError, NoMemoryError, UsageError
from service.front_door import FrontDoor
from service.gateway.served_model import ServedModel
from service.settings import ServeSettings, name_flags

if TYPE_CHECKING:  # which needs an extra
    from service.gateway_tracing import GatewayTracer


def require_model(directory: Path) -> None:
    """Raises ModelNotFoundError unless `directory` looks like a converted checkpoint. Reads nothing."""
    if not directory.is_dir():
        raise ModelNotFoundError(f"no model directory at {directory}: give one with --model")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise ModelNotFoundError(
                f"{directory} has no {name}: make a model directory from a checkpoint with "
                "'python -m model.convert CKPT.pt OUT_DIR'"
            )


def start_engine(config: EngineConfig, *, replica: str = "0") -> AsyncEngine:
    """`load_engine`, with its failures explained. Raises CommandError."""
    from service.engine.loader import load_engine

    with explained():
        require_device(config.device)
        return load_engine(config, replica=replica)


def served_model(settings: ServeSettings, info: EngineInfo) -> ServedModel:
    """What a gateway serves: the engine's model with the tokenizer beside its weights. Raises CommandError."""
    with explained():
        tokenizer = Tokenizer.load(settings.model)
        check_tokenizer(tokenizer, info)
    return ServedModel(names=(settings.model_name,), tokenizer=tokenizer, info=info, created=int(time.time()))


def own_tokenizer(settings: ServeSettings) -> str:
    """The digest of the tokenizer that a gateway with these settings has. Raises CommandError."""
    with explained():
        return tokenizer_digest(settings.model)


def check_tokenizer(tokenizer: Tokenizer | None, info: EngineInfo) -> None:
    """Raises ValueError where it has tokens that the model knows nothing of: prompts would be refused one by one."""
    if tokenizer is not None and tokenizer.vocab_size > info.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {info.vocab_size}")


def require_tracing(settings: ServeSettings) -> None:
    """Raises UsageError where traces are asked for and cannot be made. Imports nothing."""
    if settings.trace_endpoint and not find_spec("opentelemetry.exporter.otlp"):
        raise UsageError("--trace-endpoint needs packages that are not there: pip install 'tessera-mosaics[otel]'")


def gateway_tracer(settings: ServeSettings, gateway: str) -> GatewayTracer | None:
    """What makes spans of a gateway's exchanges; None where nobody asked for traces."""
    if settings.trace_endpoint is None:
        return None
    from service.gateway_tracing import GatewayTracer
    from service.tracing import make_provider

    return GatewayTracer(make_provider(settings.trace_endpoint, "gateway", gateway))


@contextmanager
def explained() -> Generator[None, None, None]:
    """Raises what the body raised while loading as a CommandError, where the reason is known."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        raise known from error


def explain(error: BaseException) -> CommandError | None:
    """The line a person should read for a failure to load an engine; None when it is not a known kind."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return NoMemoryError(f"not enough memory: {name_flags(text) or 'an allocation failed'}")
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ValueError):
        return ModelNotFoundError(f"cannot load the model: {text}")
    if isinstance(error, RuntimeError | OSError):
        return EngineStartError(f"the engine did not start: {text}")
    return None


def ready_lines(door: FrontDoor, served: ServedModel, seconds: float) -> str:
    """What is served and where, with a request to copy."""
    info = served.info
    prompt: object = "Once upon a time" if served.tokenizer else [0]
    request = json.dumps({"model": served.name, "prompt": prompt, "max_tokens": 64})
    return (
        f"\n{served.name} ({info.dtype} on {info.device}, {info.max_model_len} tokens) is ready after {seconds:.1f} s"
        f" at {door.url}\n\n"
        f"  {door.curl('/v1/completions')} -H 'Content-Type: application/json' -d {shlex.quote(request)}\n"
    )


def require_device(name: str) -> None:
    """Raises UsageError where torch cannot compute on the device."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: {reason}") from error
