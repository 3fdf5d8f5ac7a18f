"""Which engine replica takes a request: the one with the fewest, counted the moment it is picked."""

from __future__ import annotations

from collections.abc import Set

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class LeastLoadedRouter(RequestRouter):
    """Looks at every replica, for there are few of them and their requests are long.

    Serve's own router learns of a request only when its replica has answered, so that a burst ends up on one replica.
    A caller may pass `avoid`, ids of replicas to be picked only when there is no other.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`."""
        avoid: Set[str] = pending_request.kwargs.get("avoid", frozenset()) if pending_request else frozenset()
        wanted = [r for r in candidate_replicas if r.replica_id.unique_id not in avoid] or candidate_replicas
        best = min(wanted, key=self._load)
        self.replica_queue_len_cache.update(best.replica_id, self._load(best) + 1)
        return [[best]]

    def _load(self, replica: RunningReplica) -> int:
        """Requests at the replica, of all gateways, as far as it has told; a new replica counts as idle."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
