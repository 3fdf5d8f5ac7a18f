"""What can go wrong between a gateway and an engine, as a small tree the gateway maps to HTTP statuses."""

from __future__ import annotations


class EngineError(Exception):
    """Base of all that an engine client raises. The message is fit for a client to read."""


class EngineOverloadedError(EngineError):
    """The waiting queue is full; the request was not accepted and may be sent again later."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KeyOverloadedError(EngineOverloadedError):
    """The queue has room, but not for more requests of this key."""


class EngineDeadError(EngineError):
    """The engine stopped (a step raised, or the replica died): it takes no more requests."""


class FatalRequestError(EngineError):
    """Engines were lost to this request: sent again, it may bring others down.

    After a first output it is that message, as the error of the last one.
    """

    MESSAGE = "two engine replicas were lost when this request began there, so it is not tried again"

    def __init__(self) -> None:
        super().__init__(self.MESSAGE)


class RequestRejectedError(EngineError):
    """This request can never run here, whatever the load: it is longer than the engine's limit, say."""
