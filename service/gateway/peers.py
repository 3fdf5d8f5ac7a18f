"""Other gateways of the same engines: what each of them measured, so that any one can answer for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client.core import Metric


class Peers(Protocol):
    """The other gateways behind one address. Those that do not answer in time are left out."""

    async def families(self) -> Sequence[Sequence[Metric]]:
        """The metrics of each of them now, as `GatewayMetrics.families` gives them."""
        ...


class NoPeers:
    """For a gateway that has its address for itself."""

    async def families(self) -> Sequence[Sequence[Metric]]:
        return ()
