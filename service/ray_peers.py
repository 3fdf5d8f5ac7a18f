"""Gateways that are replicas of one Serve deployment, as they see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client.core import Metric
from ray.serve.handle import DeploymentHandle

from service.ray_broadcast import ask_all


class RayPeers:
    """Implements the gateway's `Peers` over the replicas of `deployment`, of which the one named `own_name` asks."""

    def __init__(self, deployment: DeploymentHandle[Any], own_name: str) -> None:
        self._handle = deployment
        self._own_name = own_name

    async def families(self) -> Sequence[Sequence[Metric]]:
        """See `Peers.families`. One that does not answer within a second is left out."""
        answers = await ask_all(self._handle, "measurements")
        return [families for name, families in answers.told if name != self._own_name]
