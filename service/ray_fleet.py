"""How many engine replicas there are and should be, as Serve's controller knows it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import cast

from ray import serve

from service.engine.stats import Fleet

_RUNNING = "RUNNING"
# One that is to move, or that stops, has a successor where there should be one.
_WANTED = ("STARTING", "UPDATING", "RECOVERING", _RUNNING)


async def ask_fleet(app_name: str, deployment_name: str) -> Fleet | None:
    """The replicas of a deployment at this moment; None where the controller does not know it.

    Raises where the controller is away.
    """
    return await asyncio.to_thread(_ask, app_name, deployment_name)


def _ask(app_name: str, deployment_name: str) -> Fleet | None:
    app = serve.status().applications.get(app_name)
    deployment = app.deployments.get(deployment_name) if app else None
    if deployment is None:
        return None
    counts = cast(Mapping[str, int], deployment.replica_states)  # which is what the names of states come as
    return Fleet(sum(counts.get(state, 0) for state in _WANTED), counts.get(_RUNNING, 0))
