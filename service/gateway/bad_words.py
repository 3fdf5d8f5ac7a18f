"""From words that must not be written to the tokens that would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model.tokenizer import Tokenizer
from service.engine.bad_words import END, START, BadWords, Edge


def forbid(words: Sequence[str], tokenizer: Tokenizer) -> BadWords:
    """Forbids every run of whole tokens that spells one of `words`, or a space and it.

    A word inside a longer token ("art" in " party") is part of another word, and is not forbidden.
    """
    spellings = set()
    for word in words:
        bare = word.lstrip(" ") or word
        spellings |= {bare.encode(), b" " + bare.encode()}
    ids = tokenizer.ids_by_bytes
    nodes: dict[bytes, int] = {b"": START}
    edges: set[Edge] = set()
    for spelling in sorted(spellings):
        _add(spelling, ids, nodes, edges)
    return BadWords(tuple(sorted(edges)), max(map(len, spellings)))


def _add(spelling: bytes, ids: Mapping[bytes, Sequence[int]], nodes: dict[bytes, int], edges: set[Edge]) -> None:
    """Adds every way from the start of `spelling` to its end; `nodes` are the beginnings reached so far."""
    for start in range(len(spelling)):
        node = nodes.get(spelling[:start])
        if node is None:
            continue
        for end in range(start + 1, len(spelling) + 1):
            for token_id in ids.get(spelling[start:end], ()):
                then = END if end == len(spelling) else nodes.setdefault(spelling[:end], len(nodes))
                edges.add((node, token_id, then))
