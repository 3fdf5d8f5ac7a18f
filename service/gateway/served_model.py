"""What a gateway serves: a name, a tokenizer and what the engine says of its model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from model.tokenizer import Tokenizer
from service.engine.stats import EngineInfo


@dataclass(frozen=True)
class ServedModel:
    """One model under one or more names. Without a tokenizer it is served for token ids only.

    `created` is a Unix time in whole seconds.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer | None
    info: EngineInfo
    created: int

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError("a served model needs at least one name, and none may be empty")

    @property
    def name(self) -> str:
        """The name answers carry when the request names no model."""
        return self.names[0]

    @cached_property
    def system_fingerprint(self) -> str:
        """Equal for two servers exactly when they give the same bytes for the same seeded request."""
        return self.info.system_fingerprint

    @cached_property
    def num_written_ids(self) -> int:
        """Token ids below this may be generated; those above, where there are any, pad the embedding."""
        known = self.info.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        return min(known, self.info.vocab_size)

    def written_tokens(self) -> list[bytes]:
        """The bytes of every id that may be generated; none for a marker, nor where there is no tokenizer."""
        tokenizer = self.tokenizer
        return [tokenizer.token_bytes(token_id) if tokenizer else b"" for token_id in range(self.num_written_ids)]

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n bytes has at least n / longest_token tokens."""
        if self.tokenizer is None:
            return 1
        lengths = (len(self.tokenizer.token_bytes(i, skip_special=False)) for i in range(self.tokenizer.vocab_size))
        return max(lengths, default=1) or 1
