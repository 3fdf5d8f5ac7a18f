"""A small byte-level BPE in tiktoken's two file formats, with tokens that cut through characters."""

import base64

from model.tokenizer import byte_to_char

# In order of rank; each joins two earlier tokens. The last ones split é, 中 and 😀 between tokens.
MERGES: list[tuple[bytes, bytes]] = [
    (b"t", b"h"),
    (b" ", b"a"),
    (b"h", b"e"),
    (b"i", b"n"),
    (b"r", b"e"),
    (b" ", b"th"),
    (b"e", b"r"),
    (b" th", b"e"),
    (b"o", b"n"),
    (b"a", b"n"),
    (b"in", b"g"),
    (b" a", b"n"),
    (b" an", b"d"),
    (b"'", b"s"),
    (b"1", b"2"),
    (b"\n", b"\n"),
    (b" ", b" "),
    (b"  ", b"  "),
    (b"a", b"a"),
    (b"aa", b"a"),
    (b"aa", b"aa"),
    (b"\xc3", b"\xa9"),
    (b"c", b"a"),
    (b"ca", b"f"),
    (b"caf", b"\xc3"),
    (b"\xe4", b"\xb8"),
    (b"\xe4\xb8", b"\xad"),
    (b"\xf0\x9f"[:1], b"\x9f"),
    (b"\x98", b"\x80"),
]


def ranks() -> dict[bytes, int]:
    tokens = [bytes([byte]) for byte in byte_to_char()] + [left + right for left, right in MERGES]
    return {token: rank for rank, token in enumerate(tokens)}


def tiktoken_file() -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks().items())


def vocab_bpe_file() -> bytes:
    chars = byte_to_char()
    spell = lambda token: "".join(chars[byte] for byte in token)  # noqa: E731
    lines = ["#version: 0.2", *(f"{spell(left)} {spell(right)}" for left, right in MERGES)]
    return "".join(line + "\n" for line in lines).encode()
