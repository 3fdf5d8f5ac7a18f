"""Values as people write them in options: sizes with a unit, lists of words."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, SecretStr

_UNITS = {"": 1, "b": 1} | {
    unit + suffix: base**power
    for power, unit in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("i", 1024), ("", 1000))
}


def parse_size(value: object) -> object:
    """Turns "2GiB", "512 MB" or "1.5G" into bytes; other types pass through. Raises ValueError on another string."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError("not a size: write a number of bytes, or a number and a unit such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int | None, BeforeValidator(parse_size)]


def split_words(value: object) -> object:
    """Turns "a, b" into a list; other types pass through."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(split_words)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(split_words)]
