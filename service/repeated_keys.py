"""Finds a key that a JSON object has twice: the fast reader keeps the last of the two values and says nothing."""

from __future__ import annotations

import json
from typing import Any


class _RepeatedKeyError(Exception):
    pass


def repeated_key(raw: bytes, value: dict[str, object]) -> str | None:
    """A key that is there more than once in one object of `raw`, the JSON of `value`; None where there is none.

    Raises RecursionError where `raw` is nested too deeply to tell. Costs a count of characters for most requests: a key
    takes a colon, so with no more of them than keys at the top, none is repeated and none lies deeper. Anything
    else is read a second time, more slowly.
    """
    if raw.count(b":") == len(value):
        return None
    try:
        json.loads(raw, object_pairs_hook=_require_distinct)
    except _RepeatedKeyError as error:
        return str(error)
    return None


def _require_distinct(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) == len(pairs):
        return
    seen = set[str]()
    for key, _ in pairs:
        if key in seen:
            raise _RepeatedKeyError(key)
        seen.add(key)
