"""The number of engine replicas as Serve's controller decides it: `wanted_replicas`, over what replicas report.

Imported by the controller: nothing heavy here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from service.autoscaling import Load, Scaling, wanted_replicas
from service.engine.stats import EngineStats

BACKLOG, USE = "backlog_s", "use"
_REPORT_PERIOD_S = 1.0
_LOOK_BACK_S = 3.0


class TokenPolicy:
    """Serve asks it several times a second, then applies bounds and delays itself, and wakes the first replica where
    there is none and a request waits.
    """

    def __init__(self, target_backlog_s: float) -> None:
        self._target_backlog_s = target_backlog_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        told: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        backlogs, uses = told.get(BACKLOG, {}), told.get(USE, {})
        loads = [Load(backlogs.get(r, 0.0), uses.get(r, 0.0)) for r in context.running_replicas]
        return wanted_replicas(loads, self._target_backlog_s), {}


def report(stats: EngineStats, use: float) -> dict[str, float]:
    """What a replica tells the controller about itself."""
    return {BACKLOG: stats.backlog_s, USE: use}


def autoscaling_config(scaling: Scaling) -> AutoscalingConfig:
    """Serve's configuration for it."""
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="service.ray_autoscaling:TokenPolicy",
        policy_kwargs={"target_backlog_s": scaling.target_backlog_s},
    )
    with warnings.catch_warnings():
        # How often replicas report has a variable in the environment to come, which replicas do not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            initial_replicas=scaling.initial_replicas,
            max_replicas=scaling.max_replicas,
            metrics_interval_s=_REPORT_PERIOD_S,
            look_back_period_s=_LOOK_BACK_S,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            policy=policy,
        )
