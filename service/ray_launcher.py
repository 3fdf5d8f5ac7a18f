"""Serving with Ray: this process is the front door and Ray's driver, engines are replicas of a Serve deployment.

The gateway listens here, in this process, so that no proxy stands between a client and its tokens.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from typing import TYPE_CHECKING

from model.fingerprint import Identity, identify, require_fingerprint
from service.config import EngineConfig
from service.engine.errors import EngineError
from service.errors import EngineStartError, ExitCode
from service.front_door import FrontDoor, open_front_door
from service.gateway.client import EngineClient
from service.launcher import run_loop, serve_client
from service.logs import configure_logging
from service.progress import Progress
from service.ray_cluster import RayCluster
from service.settings import ServeSettings, flag
from service.startup import explained, require_model, require_tracing

if TYPE_CHECKING:
    from ray.serve import Application

    from service.ray_engine import LoadEngine

# Of the engine's configuration, the names that differ from those of their options.
_OPTION_OF = {
    "model_dir": "model",
    "num_threads": "threads",
    "memory_bytes": "memory",
    "swap_bytes": "swap_memory",
    "fingerprint": "model_fingerprint",
}
_OF_DEPLOYMENT = (
    "replicas",
    "min_replicas",
    "max_replicas",
    "target_backlog",
    "upscale_delay",
    "downscale_delay",
    "update_surge",
    "num_gpus",
    "drain_timeout",
    "log_format",
    "model_copies",
    "routing",
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve_ray(settings: ServeSettings, progress: Progress) -> None:
    """Starts Ray, serves and drains. Returns when the server has ended on a signal.

    Raises CommandError, and KeyboardInterrupt when a signal came before the server was ready.
    """
    configure_logging(settings.log_level, settings.log_format)
    config = _engine_config(settings)
    settings.scaling()
    require_model(settings.model)
    require_tracing(settings)
    with open_front_door(settings) as door:
        # Ray's imports silence this remark about an extra of theirs, but not while another thread imports.
        warnings.filterwarnings("ignore", message="SOCKS support")
        # The gateway's imports fill the time in which Ray's processes start.
        threading.Thread(target=import_module, args=("service.gateway.app",), daemon=True).start()
        try:
            run_loop(_serve(settings, config, door, progress))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _engine_config(settings: ServeSettings) -> EngineConfig:
    """Replicas on one machine share its cores, unless told otherwise."""
    config = settings.engine_config()
    if config.num_threads is None and settings.ray_address is None:
        cores = len(os.sched_getaffinity(0))
        config = replace(config, num_threads=max(1, cores // settings.most_replicas))
    return config


async def _serve(settings: ServeSettings, config: EngineConfig, door: FrontDoor, progress: Progress) -> None:
    # One CPU more than replicas, for the process that Serve is controlled by: Ray starts a worker for each at once.
    cluster = RayCluster(settings.ray_address, num_cpus=settings.most_replicas + 1)
    code = ExitCode.INTERRUPTED
    try:
        with _cancelled_by_signals():
            with progress.step("Starting Ray" if settings.ray_address is None else "Joining Ray"):
                await cluster.start()
                await cluster.require_gpus(settings.most_replicas * settings.num_gpus)
            with progress.step(f"Loading {settings.model_name}"):
                app_name = _app_name(settings)
                if settings.ray_address is None:
                    await cluster.deploy(lambda: _application(settings, config), app_name)
                else:
                    await _share(cluster, app_name, settings, config)
                client = await _connect(app_name, settings)
            await serve_client(settings, client, door, progress)
            code = ExitCode.OK
    finally:
        with _signals_ignored():
            is_stopped = await cluster.stop()
        if not is_stopped:
            os._exit(code)


async def _share(cluster: RayCluster, app_name: str, settings: ServeSettings, config: EngineConfig) -> None:
    """Deploys the engines, or joins those that are there, of exactly the checkpoint that is at `settings.model`."""
    identity = await asyncio.to_thread(_identify, settings)

    def build() -> Application:
        from service.ray_model import LoadChecked

        return _application(settings, config, LoadChecked(app_name, identity, settings.model_copies or 0))

    model = settings.model.resolve() if settings.model_copies else None
    await cluster.deploy(build, app_name, _terms(settings, config, identity), model)


def _identify(settings: ServeSettings) -> Identity:
    """What is at the model's path. Raises CommandError, also where it is another than was asked for."""
    with explained():
        identity = identify(settings.model)
        require_fingerprint(settings.model, identity.fingerprint, settings.model_fingerprint)
    return identity


def _application(settings: ServeSettings, config: EngineConfig, load: LoadEngine | None = None) -> Application:
    from service.deployment import configured_engines
    from service.ray_engine import load_engine

    num_cpus = 1 if settings.ray_address is None else config.num_threads or 1
    return configured_engines(settings, config, num_cpus=num_cpus, load=load or load_engine)


def _terms(settings: ServeSettings, config: EngineConfig, identity: Identity) -> dict[str, object]:
    """What servers on one cluster have to agree on to share its engines, by option: all that these are told.

    Of the model it is the content that has to be the same: its path may be another on each machine.
    """
    told = {_OPTION_OF.get(name, name): value for name, value in asdict(config).items()}
    told |= {name: getattr(settings, name) for name in _OF_DEPLOYMENT}
    told["model"] = str(identity)
    return {flag(name): value for name, value in told.items()}


def _app_name(settings: ServeSettings) -> str:
    """The same for every launcher of a model: one that comes after a crash takes over what was left running."""
    return "tessera-" + re.sub(r"[^\w.-]", "-", settings.model_name)


async def _connect(app_name: str, settings: ServeSettings) -> EngineClient:
    from ray import serve

    from service.deployment import connect
    from service.ray_engine import ENGINE

    try:
        return await connect(serve.get_deployment_handle(ENGINE, app_name), settings)
    except EngineError as error:
        raise EngineStartError(str(error)) from error


@contextmanager
def _cancelled_by_signals() -> Generator[None, None, None]:
    """SIGINT and SIGTERM cancel the current task, so that what it has started is stopped."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in _SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


@contextmanager
def _signals_ignored() -> Generator[None, None, None]:
    """An impatient signal must not leave half of Ray behind; the body is bounded in time."""
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
