"""Which engine replica takes a request, as Serve asks it: `Affinity` decides, over the replicas that Serve offers."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from service.config import Routing
from service.engine.request import Request
from service.routing import Affinity

CACHE_TOKENS = "cache_tokens"
"""What a replica's routing statistics call the number of tokens that its memory holds."""


class EngineRouter(RequestRouter):
    """Looks at every replica, for there are few of them and their requests are long, and counts a request the moment
    its replica is picked.

    Serve's own router learns of a request only when its replica has answered, so that a burst ends up on one replica.
    A caller may pass `avoid`, ids of replicas to be picked only when there is no other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._affinity = Affinity()

    def initialize_state(self, *, routing: Routing = "prefix", **_: Any) -> None:
        """See `RequestRouter.initialize_state`: what the deployment was given for its routers."""
        self._affinity = Affinity(by_prefix=routing == "prefix")

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`."""
        avoid: Set[str] = pending_request.kwargs.get("avoid", frozenset()) if pending_request else frozenset()
        wanted = [r for r in candidate_replicas if r.replica_id.unique_id not in avoid] or candidate_replicas
        request = pending_request.args[1] if pending_request and len(pending_request.args) > 1 else None
        best = self._choose(request, {r.replica_id.unique_id: r for r in wanted})
        self.replica_queue_len_cache.update(best.replica_id, self._load(best) + 1)
        return [[best]]

    def _choose(self, request: Request | None, replicas: Mapping[str, RunningReplica]) -> RunningReplica:
        loads = {name: self._load(replica) for name, replica in replicas.items()}
        if request is None:
            return replicas[min(loads, key=lambda name: loads[name])]
        stats = {name: replica.routing_stats.get(CACHE_TOKENS) for name, replica in replicas.items()}
        told = {name: int(tokens) for name, tokens in stats.items() if tokens is not None}
        return replicas[self._affinity.choose(request, loads, told)]

    def _load(self, replica: RunningReplica) -> int:
        """Requests at the replica, of all gateways, as far as it has told; a new replica counts as idle."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
