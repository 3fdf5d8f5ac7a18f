"""Which engine replica takes a request: the one with the fewest, counted the moment it is picked.

Choices of one prompt go together, so that they can share its memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from service.engine.request import Request

_MAX_REMEMBERED = 4096


class LeastLoadedRouter(RequestRouter):
    """Looks at every replica, for there are few of them and their requests are long.

    Serve's own router learns of a request only when its replica has answered, so that a burst ends up on one replica.
    A caller may pass `avoid`, ids of replicas to be picked only when there is no other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._homes: OrderedDict[int, str] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`."""
        avoid: Set[str] = pending_request.kwargs.get("avoid", frozenset()) if pending_request else frozenset()
        wanted = [r for r in candidate_replicas if r.replica_id.unique_id not in avoid] or candidate_replicas
        request = pending_request.args[1] if pending_request and len(pending_request.args) > 1 else None
        best = self._home(request, wanted) or min(wanted, key=self._load)
        if request is not None:
            self._remember(request, best)
        self.replica_queue_len_cache.update(best.replica_id, self._load(best) + 1)
        return [[best]]

    def _home(self, request: Request | None, wanted: list[RunningReplica]) -> RunningReplica | None:
        """Where the first choice of this prompt went, for a later one."""
        if request is None or request.sampling.choice_index == 0:
            return None
        home = self._homes.get(_family(request))
        return next((r for r in wanted if r.replica_id.unique_id == home), None)

    def _remember(self, request: Request, replica: RunningReplica) -> None:
        family = _family(request)
        self._homes[family] = replica.replica_id.unique_id
        self._homes.move_to_end(family)
        if len(self._homes) > _MAX_REMEMBERED:
            self._homes.popitem(last=False)

    def _load(self, replica: RunningReplica) -> int:
        """Requests at the replica, of all gateways, as far as it has told; a new replica counts as idle."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _family(request: Request) -> int:
    """The same for all choices of a prompt: they have one seed."""
    return hash((request.cache_salt, request.sampling.seed, request.prompt_token_ids))
