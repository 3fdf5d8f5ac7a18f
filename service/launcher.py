"""Serving from one process: the gateway and the engine on one event loop, the step in a thread. Without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import replace
from importlib import import_module
from typing import Any

from service.engine.async_engine import AsyncEngine
from service.engine.local_client import LocalEngineClient
from service.errors import AddressError, UsageError
from service.front_door import FrontDoor, open_front_door
from service.garbage import freeze
from service.gateway.client import EngineClient
from service.interrupt import interruptible
from service.logs import configure_logging
from service.progress import Progress
from service.settings import ServeSettings
from service.startup import gateway_tracer, ready_lines, require_model, require_tracing, served_model, start_engine


def serve_local(settings: ServeSettings, progress: Progress) -> None:
    """Loads, serves and drains. Returns when the server has ended on a signal. Raises CommandError."""
    configure_logging(settings.log_level, settings.log_format)
    config = settings.engine_config()
    settings.scaling()
    if settings.most_replicas > 1 or settings.ray_address:
        raise UsageError("--local is one process without Ray: leave out --replicas, --max-replicas and --ray-address")
    require_model(settings.model)
    require_tracing(settings)
    with open_front_door(settings) as door:
        # The gateway's imports fill the time in which the checkpoint is read and hashed.
        warm_up = threading.Thread(target=import_module, args=("service.gateway.app",), daemon=True)
        with interruptible(), progress.step(f"Loading {settings.model_name}"):
            warm_up.start()
            engine = start_engine(config)
            warm_up.join()
        run_loop(_serve(settings, engine, door, progress))


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs `main` on a fast event loop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def _serve(settings: ServeSettings, engine: AsyncEngine, door: FrontDoor, progress: Progress) -> None:
    engine.start()
    await serve_client(settings, LocalEngineClient(engine), door, progress)


async def serve_client(settings: ServeSettings, client: EngineClient, door: FrontDoor, progress: Progress) -> None:
    """Puts a gateway before `client`, serves until a signal, drains and closes `client`. Raises AddressError."""
    from service.gateway import http_server
    from service.gateway.app import create_app

    served = served_model(settings, await client.info())
    name = door.url.partition("://")[2] or door.url
    limits = replace(settings.gateway_settings(), name=name, allowed_hosts=door.allowed_hosts)
    tracer = gateway_tracer(settings, limits.name)
    app = create_app(client, served, limits, keys=door.keys, tracer=tracer)

    def on_ready() -> None:
        freeze()
        app.state.gateway.metrics.started(progress.elapsed_s)
        progress.say(ready_lines(door, served, progress.elapsed_s))

    try:
        num_cut = await http_server.serve(
            app,
            door.sock,
            app.state.drain,
            drain_delay_s=settings.drain_delay,
            drain_timeout_s=settings.drain_timeout,
            on_ready=on_ready,
            on_hangup=door.reload if door.has_files else None,
            on_drain=lambda: progress.say("Finishing what is running; a second signal ends it now."),
            tls=door.tls,
            trusted_proxies=settings.trusted_proxies,
        )
    except OSError as error:
        raise AddressError(door.address.explain(error)) from error
    finally:
        await client.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)
    progress.say(f"Ended. {num_cut} requests were cut short." if num_cut else "Ended.")
