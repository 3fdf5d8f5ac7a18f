"""By what a text is known: chained hashes over its tokens and its cache salt."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from service.engine.sequence import Sequence

_KEY_BYTES = 32


class PrefixKeys:
    """Keys of the beginnings of sequences that end with a complete block, or as a tail.

    BLAKE2b with 256 bits: nobody can make two texts of one hash, so equal keys are equal texts of one salt.
    """

    def __init__(self, block_size: int, look_ahead: int) -> None:
        self._block_size = block_size
        self._look_ahead = look_ahead

    def end(self, m: int) -> int:
        """Tokens after which block m is complete."""
        return (m + 1) * self._block_size + self._look_ahead

    def num_complete(self, num_tokens: int) -> int:
        """Blocks that so many tokens complete."""
        return max(num_tokens - self._look_ahead, 0) // self._block_size

    def of_blocks(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Of every block that `num_tokens` tokens complete. The sequence keeps those worked out before."""
        keys, num_blocks = sequence.block_keys, self.num_complete(num_tokens)
        for m in range(len(keys), num_blocks):
            start = self.end(m - 1) if m else 0
            keys.append(_chain(keys[-1] if m else _root(sequence), sequence.token_ids[start : self.end(m)]))
        return keys if len(keys) == num_blocks else keys[:num_blocks]

    def parent(self, sequence: Sequence, num_tokens: int) -> tuple[bytes, int]:
        """Of the last block that `num_tokens` tokens complete, or of no text; and after how many tokens it ends."""
        keys = self.of_blocks(sequence, num_tokens)
        return (keys[-1], self.end(len(keys) - 1)) if keys else (_root(sequence), 0)

    def of_tail(self, sequence: Sequence, num_tokens: int) -> bytes | None:
        """Of the first `num_tokens` tokens; None where that is the end of a block, or too early for a pair."""
        if (num_tokens - self._look_ahead) % self._block_size == 0 or num_tokens <= self._look_ahead:
            return None
        key = sequence.tail_keys.get(num_tokens)
        if key is None:
            parent, start = self.parent(sequence, num_tokens)
            key = sequence.tail_keys[num_tokens] = _chain(parent, sequence.token_ids[start:num_tokens])
        return key


def _root(sequence: Sequence) -> bytes:
    return blake2b(sequence.request.cache_salt.encode(), digest_size=_KEY_BYTES).digest()


def _chain(key: bytes, token_ids: list[int]) -> bytes:
    return blake2b(key + array("I", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()
