"""Why a command ends early: one line for a person, one exit code for a script."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What `tessera` ends with. 2 is also what the option parser uses."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NO_MODEL = 3
    ADDRESS = 4
    NO_MEMORY = 5
    ENGINE = 6
    INTERRUPTED = 130


class CommandError(Exception):
    """Base of all that ends a command with one line on stderr. The message says what to do where that is known."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILURE


class UsageError(CommandError):
    """An option or a setting that cannot be used."""

    exit_code = ExitCode.USAGE


class ModelNotFoundError(CommandError):
    """The directory holds no checkpoint, or one that cannot be read."""

    exit_code = ExitCode.NO_MODEL


class AddressError(CommandError):
    """The address cannot be listened on: in use, forbidden or not this machine's."""

    exit_code = ExitCode.ADDRESS


class NoMemoryError(CommandError):
    """Weights or memory cache do not fit."""

    exit_code = ExitCode.NO_MEMORY


class EngineStartError(CommandError):
    """The engine did not come up, for another reason."""

    exit_code = ExitCode.ENGINE


class InterruptedCommandError(CommandError):
    """A signal ended it before it was done."""

    exit_code = ExitCode.INTERRUPTED
