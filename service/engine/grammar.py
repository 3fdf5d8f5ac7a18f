"""What a text must look like, as a client wrote it down. Knows not how such a rule is followed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# How the error of an output begins where the request's own grammar is to blame.
FAULT = "the grammar could not be followed: "


class GrammarKind(StrEnum):
    """The language in which a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    CONTEXT_FREE = "context_free"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A rule for a whole text: compiled once wherever it is needed, equal to another exactly when it says the same.

    `source` is a JSON schema, a regular expression in the syntax of Rust's regex crate, a JSON array of strings of
    which the text is one, or a context-free grammar in the notation of Lark or of llama.cpp's GBNF.
    """

    kind: GrammarKind
    source: str
