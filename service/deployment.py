"""The Ray Serve applications: engines alone, behind a gateway elsewhere, or engines and gateways together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from service.autoscaling import Scaling
from service.config import EngineConfig, Routing
from service.engine.errors import EngineError
from service.garbage import freeze
from service.gateway.app import create_app
from service.keys import load_keys
from service.logs import LogFormat, configure_logging
from service.ray_autoscaling import autoscaling_config
from service.ray_client import RayEngineClient
from service.ray_engine import ENGINE, EngineReplica, LoadEngine, load_engine
from service.ray_link import Timeouts
from service.ray_peers import RayPeers
from service.ray_router import EngineRouter
from service.settings import ServeSettings
from service.startup import gateway_tracer, own_tokenizer, served_model

GATEWAY = "Gateway"
_MAX_GATEWAYS = 64
# Requests a replica may hold beyond what its engine accepts, so that the refusal is the engine's, with its reason.
# (It may have to hold as many again that a lost replica had.)
_REFUSAL_SLACK = 64
_MAX_CONNECTIONS = 4096
_RETRY_S = 1.0
# Settings of a server of our own, which is not there when Serve does the listening; and keys, since Ray keeps and shows
# what an application is configured with: they belong into a file.
_NOT_IN_A_CLUSTER = {
    "host",
    "port",
    "local",
    "ray_address",
    "uds",
    "uds_mode",
    "ssl_certfile",
    "ssl_keyfile",
    "trusted_proxies",
    "drain_delay",
    "api_key",
}


def engine_application(
    config: EngineConfig,
    *,
    num_replicas: int = 1,
    scaling: Scaling | None = None,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    drain_timeout_s: float = 60.0,
    update_surge: int = 25,
    routing: Routing = "prefix",
    log_format: LogFormat = "text",
    load: LoadEngine = load_engine,
) -> Application:
    """The application of `num_replicas` engines, or of as many as `scaling` says, each with these CPUs and GPUs.

    CPUs count for Ray's scheduling alone; threads are `config.num_threads`.
    `drain_timeout_s` is how long a replica that has to go waits for the requests it is working on. In an update
    `update_surge` percent more replicas may be there, so that old ones go when new ones serve.
    """
    capacity = config.max_num_seqs + config.max_num_waiting
    most_replicas = num_replicas if scaling is None else scaling.max_replicas
    deployment = serve.deployment(
        name=ENGINE,
        num_replicas=num_replicas if scaling is None else None,
        autoscaling_config=None if scaling is None else autoscaling_config(scaling),
        max_surge_percent=update_surge,
        max_ongoing_requests=2 * capacity + _MAX_GATEWAYS + _REFUSAL_SLACK,
        max_queued_requests=capacity * most_replicas + _REFUSAL_SLACK,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,
        request_router_config={
            "request_router_class": EngineRouter,
            "request_router_kwargs": {"routing": routing},
        },
        logging_config=_logging(log_format),
    )(EngineReplica)
    return deployment.bind(config, load)


def configured_engines(
    settings: ServeSettings, config: EngineConfig, *, num_cpus: int, load: LoadEngine = load_engine
) -> Application:
    """`engine_application` as the options of `tessera serve` say."""
    return engine_application(
        config,
        num_replicas=settings.replicas,
        scaling=settings.scaling(),
        update_surge=settings.update_surge,
        routing=settings.routing,
        num_cpus=num_cpus,
        num_gpus=settings.num_gpus,
        drain_timeout_s=settings.drain_timeout,
        log_format=settings.log_format,
        load=load,
    )


async def connect(engine: DeploymentHandle[EngineReplica], settings: ServeSettings) -> RayEngineClient:
    """A gateway's client as these options say. Raises EngineError, and CommandError where its tokenizer is none."""
    timeouts = Timeouts(resume_s=settings.resume_timeout, wake_s=settings.wake_timeout)
    return await RayEngineClient.connect(engine, timeouts, own_tokenizer(settings))


def _logging(log_format: LogFormat) -> LoggingConfig:
    """Of Serve's own log: the access log is the gateway's affair."""
    return LoggingConfig(enable_access_log=False, encoding="JSON" if log_format == "json" else "TEXT")


@serve.ingress()
class GatewayReplica:
    """A gateway whose HTTP server is Serve's."""

    async def __init__(self, settings: ServeSettings, engine: DeploymentHandle[EngineReplica]) -> None:  # type: ignore[misc]
        configure_logging(settings.log_level, settings.log_format)
        client: RayEngineClient | None = None
        while client is None:
            # Engines take as long as they take to load, or to be replaced by those that have this gateway's tokenizer;
            # should they fail, the application does.
            try:
                client = await connect(engine, settings)
            except EngineError:
                await asyncio.sleep(_RETRY_S)
        context = serve.get_replica_context()
        name = context.replica_id.unique_id
        served = served_model(settings, await client.info())
        peers = RayPeers(serve.get_deployment_handle(GATEWAY, context.app_name), name)
        self._app = create_app(
            client,
            served,
            replace(settings.gateway_settings(), name=name),
            peers,
            load_keys(settings),
            gateway_tracer(settings, name),
        )
        freeze()

    async def measurements(self) -> tuple[str, list[Metric]]:
        """This gateway's name and metrics."""
        metrics = self._app.state.gateway.metrics
        return metrics.gateway, metrics.families()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


def build(args: Mapping[str, Any]) -> Application:
    """The application of engines and gateways, for `serve run` and Serve's configuration files.

    `args` are options of `tessera serve`, with their names and meanings. Numbers of replicas and autoscaling are
    better set on the deployments, `Engine` and `Gateway`. Raises ValueError, naming the option.
    """
    if misplaced := sorted(_NOT_IN_A_CLUSTER & args.keys()):
        raise ValueError(f"not an option in a cluster: {', '.join(misplaced)}")
    settings = ServeSettings.model_validate(dict(args))
    config = settings.engine_config()
    engine = configured_engines(settings, config, num_cpus=config.num_threads or 1)
    gateway = serve.deployment(
        name=GATEWAY,
        max_ongoing_requests=_MAX_CONNECTIONS,
        max_surge_percent=settings.update_surge,
        ray_actor_options={"num_cpus": 0.5},
        # One that says nothing three times has to go, and with it the connections that wait for it in vain.
        health_check_period_s=1.0,
        health_check_timeout_s=5.0,
        graceful_shutdown_timeout_s=settings.drain_timeout,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_logging(settings.log_format),
    )(GatewayReplica)
    return gateway.bind(settings, engine)
