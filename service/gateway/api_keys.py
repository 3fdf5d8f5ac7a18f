"""Who may use a server, and how much of it: API keys read from a file or given as options, kept as digests alone."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

MAX_KEYS = 10_000
MAX_KEY_CHARS = 512

_Rate = Annotated[int, Field(ge=1, le=10**12)]
_Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


class ApiKey(BaseModel):
    """One key: an id for logs and metrics, the SHA-256 of the secret, and what it may do.

    Rates of None are without limit. `weight` is its share of the engine beside other keys; a request's priority must
    lie in `min_priority`..`max_priority`, where lower is sooner. `admin` opens what concerns the whole server.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    requests_per_minute: _Rate | None = None
    tokens_per_minute: _Rate | None = None
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    min_priority: _Priority = 0
    max_priority: _Priority = 2**31 - 1
    admin: bool = False

    @model_validator(mode="before")
    @classmethod
    def _hide(cls, values: Any) -> Any:
        """Turns a `key` in clear into its digest, before anything could show it."""
        if not isinstance(values, dict) or "key" not in values:
            return values
        if "sha256" in values:
            raise ValueError("give 'key' or 'sha256', not both")
        rest = {name: value for name, value in values.items() if name != "key"}
        return rest | {"sha256": digest(check_secret(values["key"])).hex()}

    @model_validator(mode="after")
    def _check(self) -> ApiKey:
        if self.min_priority > self.max_priority:
            raise ValueError("min_priority must be at most max_priority")
        return self


class KeyRing:
    """Finds the key that a secret belongs to, in a time that tells nothing of the secrets.

    Secrets are looked up under a keyed digest that nobody outside this process can foresee, so how far a comparison
    gets says nothing; what is found is compared once more in constant time.
    """

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._blind = secrets.token_bytes(32)
        self._keys: dict[bytes, ApiKey] = {}
        self.replace(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """From now on these are the keys. Raises ValueError where they contradict each other, and changes nothing."""
        keys = list(keys)
        if not keys:
            raise ValueError("there is no API key")
        if len(keys) > MAX_KEYS:
            raise ValueError(f"there are {len(keys)} API keys; at most {MAX_KEYS} can be used")
        found = {self._blinded(bytes.fromhex(key.sha256)): key for key in keys}
        if len(found) < len(keys):
            raise ValueError("two API keys are the same")
        ids = {key.id for key in keys}
        if len(ids) < len(keys):
            twice = next(key.id for i, key in enumerate(keys) if key.id in {k.id for k in keys[:i]})
            raise ValueError(f"two API keys have the id {twice!r}")
        self._keys = found

    def find(self, secret: bytes) -> ApiKey | None:
        """The key of `secret`, None where there is none."""
        hashed = hashlib.sha256(secret).digest()
        key = self._keys.get(self._blinded(hashed))
        return key if key is not None and hmac.compare_digest(hashed.hex(), key.sha256) else None

    def _blinded(self, hashed: bytes) -> bytes:
        return hmac.digest(self._blind, hashed, "sha256")


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def check_secret(secret: object) -> str:
    """`secret`, if it can stand in a header. Raises ValueError, which never shows it."""
    text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_KEY_CHARS:
        raise ValueError(f"a key must be a text of 1 to {MAX_KEY_CHARS} characters")
    if not all("!" <= char <= "~" for char in text):
        raise ValueError("a key must be of printable ASCII characters without spaces")
    return text


def keys_of_options(given: Sequence[str]) -> list[ApiKey]:
    """The keys of whoever started the server, who may see all of it. Raises ValueError."""
    return [_anonymous(secret, admin=True, min_priority=-(2**31)) for secret in given]


def read_key_file(path: Path) -> list[ApiKey]:
    """The keys in a YAML file (by its name), or in a file of one key a line with `#` before comments.

    Raises OSError, and ValueError without any part of a key in it.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(text)
    lines = (line.strip() for line in text.splitlines())
    return [_anonymous(line) for line in lines if line and not line.startswith("#")]


def _anonymous(secret: str, **rights: Any) -> ApiKey:
    """A key that is called by the beginning of its digest."""
    hashed = digest(check_secret(secret)).hex()
    return ApiKey(id=f"key-{hashed[:8]}", sha256=hashed, **rights)


def _from_yaml(text: str) -> list[ApiKey]:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError("not YAML" + (f" at line {mark.line + 1}" if mark else "")) from None
    if not isinstance(document, dict) or set(document) != {"keys"} or not isinstance(document["keys"], list):
        raise ValueError("must hold a mapping with 'keys', a list, and nothing else")
    return [_entry(i, entry) for i, entry in enumerate(document["keys"])]


def _entry(index: int, entry: object) -> ApiKey:
    try:
        return ApiKey.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(["keys", str(index), *map(str, first["loc"])])
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
