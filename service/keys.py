"""From a server's settings to the API keys it asks for, without a secret in any message."""

from __future__ import annotations

import logging
from pathlib import Path

from service.errors import UsageError
from service.gateway.api_keys import ApiKey, KeyRing, keys_of_options, read_key_file
from service.settings import ServeSettings, flag

logger = logging.getLogger(__name__)


def load_keys(settings: ServeSettings) -> KeyRing | None:
    """The keys of --api-key and --api-key-file together; None where neither is given. Raises UsageError."""
    if not settings.api_key and settings.api_key_file is None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(settings, name) is not None:
                raise UsageError(f"{flag(name)} limits API keys, and there is none: give --api-key-file")
        return None
    try:
        return KeyRing(_all_keys(settings))
    except ValueError as error:
        raise UsageError(str(error)) from None


def reload_keys(settings: ServeSettings, keys: KeyRing) -> None:
    """Reads the file again. Where it cannot be used the keys stay as they are, and the log says why."""
    try:
        keys.replace(_all_keys(settings))
    except (UsageError, ValueError) as error:
        logger.error("the API keys stay as they were: %s", error)  # noqa: TRY400 - a line for an operator
    else:
        logger.info("%d API keys are known now", len(keys))


def _all_keys(settings: ServeSettings) -> list[ApiKey]:
    try:
        keys = keys_of_options([secret.get_secret_value() for secret in settings.api_key])
    except ValueError as error:
        raise UsageError(f"--api-key: {error}") from None
    return keys + _read(settings.api_key_file) if settings.api_key_file is not None else keys


def _read(path: Path) -> list[ApiKey]:
    try:
        keys = read_key_file(path)
        is_private = not path.stat().st_mode & 0o077
    except OSError as error:
        raise UsageError(f"--api-key-file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--api-key-file {path}: {error}") from None
    if not is_private:
        logger.warning("%s can be read by other users of this machine: chmod 600 it", path)
    return keys
