"""Text from a growing list of token ids, never showing half a character."""

import codecs
from collections.abc import Sequence

from model.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns token ids into text as they arrive.

    A character whose bytes lie in several tokens is held back until its last one; bytes that cannot begin or
    continue a character become U+FFFD at once. All pushes and the flush, joined, equal `Tokenizer.decode` of
    all ids. Each push costs time in its own ids only.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_between_characters = True

    def push(self, token_ids: Sequence[int]) -> str:
        """The text completed by `token_ids`."""
        if self._is_between_characters and len(token_ids) == 1:
            text = self._tokenizer.whole_text(token_ids[0])
            if text is not None:
                return text
        return self._decode(self._tokenizer.bytes_of(token_ids, self._skip_special))

    def _decode(self, text: bytes) -> str:
        decoded = self._decoder.decode(text)
        self._is_between_characters = not self._decoder.getstate()[0]
        return decoded

    def push_one(self, token_id: int) -> tuple[int, str]:
        """The text completed by one token, and how many characters of it were there before the token's first byte.

        These are U+FFFD: bytes of earlier tokens that turn out to begin no character.
        """
        text = self._tokenizer.token_bytes(token_id, self._skip_special)
        pending = self._decoder.getstate()[0]
        if not pending or not text:
            return 0, self._decode(text)
        first = self._decoder.decode(text[:1])
        left = self._decoder.getstate()[0]
        continues = pending + text[:1] in (left, first.encode())
        return 0 if continues else len(first) - (not left), first + self._decode(text[1:])

    def flush(self) -> str:
        """The text of the bytes held back, now that no token follows; ready for a new text after it."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._is_between_characters = True
        return text
