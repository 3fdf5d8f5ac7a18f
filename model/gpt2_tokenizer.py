"""GPT-2's byte-level BPE, built from the data files of tiktoken's `gpt2` encoding.

Finds the data where tiktoken caches it, or has tiktoken download it. Knows nothing of checkpoints.
"""

import base64
import binascii
import hashlib
import os
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model.tokenizer import END_OF_TEXT, Tokenizer, byte_to_char


class TokenizerDataError(Exception):
    """GPT-2's tokenizer data is not at hand; the message names the file and where to put it."""


@dataclass(frozen=True)
class DataFile:
    """A published data file and the SHA-256 that tiktoken expects of it."""

    url: str
    sha256: str

    @property
    def cache_name(self) -> str:
        """The file's name in tiktoken's cache."""
        return hashlib.sha1(self.url.encode(), usedforsecurity=False).hexdigest()


# The same merges twice: tiktoken's own format, and the one of the original release.
R50K_BASE = DataFile(
    "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
)
VOCAB_BPE = DataFile(
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)


def gpt2_tokenizer_json() -> str:
    """The text of a tokenizer.json equal to tiktoken's `gpt2`: ids 0..50255, `<|endoftext|>` = 50256.

    TokenizerDataError where the data is neither cached nor can be downloaded.
    """
    return byte_level_bpe_json(_load_ranks())


def byte_level_bpe_json(ranks: dict[bytes, int]) -> str:
    """The text of a tokenizer.json that splits text as tiktoken does with `ranks`, `<|endoftext|>` last.

    `ranks` numbers every token from 0 up, what is merged after its parts. Where single bytes stand does not matter.

    A token's merge is the pair of parts into which its own bytes fall under the merges ranked before it. Two
    neighbours that spell a token in running text came about inside those same bytes by those same merges, so
    merging by pair and merging by spelling, as tiktoken does, agree.
    """
    to_char = byte_to_char()
    spelling = {token: "".join(to_char[byte] for byte in token) for token in ranks}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("the ranks must number every single byte and every token, from 0 up")
    merges = [
        (spelling[left], spelling[right])
        for left, right in (_parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if token[1:])
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={spelling[token]: rank for token, rank in ranks.items()}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    serialized = backend.to_str()
    Tokenizer(serialized)
    return serialized


def parse_tiktoken(data: bytes) -> dict[bytes, int]:
    """Ranks from tiktoken's format: a line per token, its bytes in base64 and its rank."""
    try:
        pairs = [line.split() for line in data.splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"not a .tiktoken file: {error}") from None


def parse_vocab_bpe(text: str) -> dict[bytes, int]:
    """Ranks from the original release's format: a version line, then a merge a line in order of rank.

    The 256 single bytes come first, those that print before those that do not.
    """
    to_char = byte_to_char()
    to_byte = {char: byte for byte, char in to_char.items()}
    tokens = [bytes([byte]) for byte in to_char]
    try:
        for line in text.splitlines()[1:]:
            left, right = line.split(" ")
            tokens.append(bytes(to_byte[char] for char in left + right))
    except (ValueError, KeyError):
        raise ValueError(f"not a vocab.bpe file: {line!r} is no merge") from None
    return {token: rank for rank, token in enumerate(tokens)}


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= ranks[token]:
            raise ValueError(f"the token {token!r} is not made of two tokens ranked before it")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _load_ranks() -> dict[bytes, int]:
    cached = _read_cached(R50K_BASE)
    if cached is not None:
        return parse_tiktoken(cached)
    cached = _read_cached(VOCAB_BPE)
    if cached is not None:
        return parse_vocab_bpe(cached.decode())
    return parse_tiktoken(_download(R50K_BASE))


def _cache_dir() -> Path | None:
    # tiktoken's own rule; an empty variable turns its cache off.
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable]) if os.environ[variable] else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _read_cached(file: DataFile) -> bytes | None:
    directory = _cache_dir()
    if directory is None:
        return None
    try:
        data = (directory / file.cache_name).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == file.sha256 else None


def _download(file: DataFile) -> bytes:
    try:
        from tiktoken.load import read_file_cached

        return read_file_cached(file.url, file.sha256)
    except ImportError:
        reason = "tiktoken, which downloads it, is not installed (pip install 'tessera-mosaics[convert]')"
    except (OSError, ValueError) as error:
        reason = f"it could not be downloaded ({type(error).__name__})"
    directory = _cache_dir() or "a directory named by TIKTOKEN_CACHE_DIR"
    raise TokenizerDataError(
        f"the GPT-2 tokenizer needs {file.url} (SHA-256 {file.sha256[:12]}...) and {reason}; "
        f"put that file at {directory}/{file.cache_name} and try again"
    )
