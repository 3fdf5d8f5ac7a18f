"""Which replica a request goes to: its session's, or where most of its prompt is in memory, or the least loaded.

Pure arithmetic over what a gateway has seen; knows no Ray. Replicas are names, loads are requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from hashlib import blake2b

from service.engine.request import Request

PAGE_TOKENS = 32
"""Prompts are compared in pages of so many tokens."""
DEFAULT_CACHE_TOKENS = 65_536
"""What a replica is believed to remember before it has said so."""
# Whom a request would rather go to may have so many requests more than the least loaded has, or this share of the mean.
_MAX_EXCESS = 2
_MAX_EXCESS_SHARE = 0.25
_MAX_FAMILIES = 4096


class Affinity:
    """Chooses, and remembers what it chose. For one thread.

    Choices of one prompt stay together. A session has a home among the replicas that are there, by rendezvous hashing
    (Thaler and Ravishankar, 1998), so that all gateways agree on it without talking. Without a session, the replica
    that has been given the longest beginning of the prompt has it cached. A replica that has too much to do already is
    passed over (Mirrokni et al., 2018, "Consistent hashing with bounded loads"): then the next best is as good. Without
    `by_prefix` what a prompt begins with does not count.
    """

    def __init__(self, *, by_prefix: bool = True) -> None:
        self._by_prefix = by_prefix
        self._given: dict[str, _Pages] = {}
        self._families: OrderedDict[int, str] = OrderedDict()

    def choose(self, request: Request, loads: Mapping[str, int], cache_tokens: Mapping[str, int] | None = None) -> str:
        """One of `loads`, which are not empty. `cache_tokens` is how much each of them can remember, where known."""
        pages = pages_of(request) if self._by_prefix else []
        chosen = self._family_home(request, loads) or self._prefer(request, pages, loads)
        self._remember(request, chosen)
        sizes = cache_tokens or {}
        if chosen not in self._given:
            self._given = {replica: given for replica, given in self._given.items() if replica in loads}
            self._given[chosen] = _Pages()
        self._given[chosen].learn(pages, sizes.get(chosen, DEFAULT_CACHE_TOKENS) // PAGE_TOKENS)
        return chosen

    def _prefer(self, request: Request, pages: list[int], loads: Mapping[str, int]) -> str:
        least = min(loads.values())
        most = least + max(_MAX_EXCESS, _MAX_EXCESS_SHARE * sum(loads.values()) / len(loads))
        possible = [replica for replica, load in loads.items() if load < most or load == least]
        if request.session_id:
            return session_home(request.session_id, possible)
        known = {replica: given.match(pages) for replica in possible if (given := self._given.get(replica))}
        longest = max(known.values(), default=0)
        return min((r for r in possible if known.get(r, 0) == longest), key=lambda replica: loads[replica])

    def _family_home(self, request: Request, loads: Mapping[str, int]) -> str | None:
        """Where the first choice of this prompt went, for a later one."""
        if request.sampling.choice_index == 0:
            return None
        home = self._families.get(_family(request))
        return home if home in loads else None

    def _remember(self, request: Request, replica: str) -> None:
        family = _family(request)
        self._families[family] = replica
        self._families.move_to_end(family)
        if len(self._families) > _MAX_FAMILIES:
            self._families.popitem(last=False)


class _Pages:
    """The pages that one replica has been given, least recently used first: as many as it can remember."""

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()

    def match(self, pages: Iterable[int]) -> int:
        """How many of a prompt's first pages are here."""
        num_known = 0
        for page in pages:
            if page not in self._pages:
                break
            num_known += 1
        return num_known

    def learn(self, pages: list[int], max_pages: int) -> None:
        # The end of a text is forgotten before its beginning, as in the replica.
        for page in reversed(pages):
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > max_pages:
            self._pages.popitem(last=False)


def pages_of(request: Request) -> list[int]:
    """Hashes of the beginnings of a request's text that end with a full page. Equal ones are equal texts, or nearly
    certainly so: a collision costs a replica's memory, not a right answer.
    """
    ids = request.prompt_token_ids + request.output_token_ids
    pages, page = [], hash(request.cache_salt)
    for end in range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS):
        page = hash((page, ids[end - PAGE_TOKENS : end]))
        pages.append(page)
    return pages


def session_home(session_id: str, replicas: Iterable[str]) -> str:
    """The replica of a session: the same for everybody who sees the same replicas, and as long as that one is there."""
    return max(replicas, key=lambda replica: blake2b(f"{session_id}\0{replica}".encode(), digest_size=8).digest())


def _family(request: Request) -> int:
    """The same for all choices of a prompt: they have one seed."""
    return hash((request.cache_salt, request.sampling.seed, request.prompt_token_ids))
