"""Reads a Dockerfile as far as ours goes: stages and their instructions, variables put in."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, its lines joined: `RUN`, and what follows as written."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments without options such as --chown."""
        return [word for word in shlex.split(self.text) if not word.startswith("--")]

    @property
    def options(self) -> dict[str, str]:
        pairs = [word[2:].split("=", 1) for word in shlex.split(self.text) if word.startswith("--")]
        return {pair[0]: pair[-1] for pair in pairs}

    @property
    def exec_form(self) -> list[str]:
        """The words of a JSON array, as CMD and ENTRYPOINT have."""
        words: list[str] = json.loads(self.text)
        return words


@dataclass(slots=True)
class Stage:
    """From one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [item for item in self.instructions if item.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]

    def environment(self, before: Mapping[str, str]) -> dict[str, str]:
        """`before` with what ENV adds."""
        values = dict(before)
        for item in self.all("ENV"):
            for word in item.words:
                key, value = word.split("=", 1)
                values[key] = put_in(value, values)
        return values


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile. ValueError on an instruction before the first FROM other than ARG."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        instruction = Instruction(name.upper(), rest.strip())
        if instruction.name == "FROM":
            words = instruction.words
            stages.append(Stage(put_in(words[0], arguments), words[2] if len(words) == 3 else ""))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.name == "ARG":
            key, _, value = instruction.text.partition("=")
            arguments[key] = value
        else:
            raise ValueError(f"{instruction.name} before FROM")
    return stages


def put_in(text: str, values: Mapping[str, str]) -> str:
    """`text` with $NAME and ${NAME} replaced."""
    return _VARIABLE.sub(lambda match: values.get(match[1] or match[2], ""), text)
