"""Finds a key that a JSON object has twice: the fast reader keeps the last of the two values and says nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Repeated:
    """Stands for an object that has a key twice."""

    key: str


def repeated_key(raw: bytes, value: dict[str, object]) -> str | None:
    """The path of a key that is there more than once in one object of `raw`, the JSON of `value`; None where there is
    none. `a.b[2].c` is c in the third object of the list b in a.

    Raises RecursionError where `raw` is nested too deeply to tell. Costs a count of characters for most requests: a key
    takes a colon, so with no more of them than keys at the top, none is repeated and none lies deeper. Anything
    else is read a second time, more slowly.
    """
    if raw.count(b":") == len(value):
        return None
    found: list[_Repeated] = []

    def read_object(pairs: list[tuple[str, Any]]) -> object:
        members = dict(pairs)
        if len(members) == len(pairs):
            return members
        counts = Counter(key for key, _ in pairs)
        found.append(_Repeated(next(key for key, count in counts.items() if count > 1)))
        return found[-1]

    whole = json.loads(raw, object_pairs_hook=read_object)
    return next(_paths(whole)) if found else None


def _paths(value: object) -> Iterator[str]:
    """Where in `value` objects were marked, outermost names first."""
    if isinstance(value, _Repeated):
        yield value.key
    elif isinstance(value, dict):
        for key, inner in value.items():
            for path in _paths(inner):
                yield f"{key}{path}" if path.startswith("[") else f"{key}.{path}"
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            for path in _paths(inner):
                yield f"[{index}]{path}" if path.startswith("[") else f"[{index}].{path}"
