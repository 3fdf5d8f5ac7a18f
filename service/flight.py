"""One request on its way through an engine elsewhere, as the gateway sees it. Knows nothing of how it got there."""

from __future__ import annotations

import asyncio

from service.engine.errors import EngineDeadError, EngineError
from service.engine.request import FinishReason, RequestOutput
from service.wire import merge


class Flight:
    """What came back for a request and was not read yet.

    The one reader gets exactly one finished output, or an error before any output; what comes later is dropped.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.replica: str | None = None
        self._output: RequestOutput | None = None
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_read = False
        self.is_finished = False
        self.is_lost = False

    def put(self, output: RequestOutput) -> None:
        if not self.is_finished:
            self.is_finished = output.is_finished
            self._output = merge(self._output, output)
            self._wake()

    def fail(self, message: str) -> None:
        """Ends the request here: an error for a reader that has read nothing, else a last output."""
        if self.is_finished:
            return
        self.is_lost = True
        if self._is_read or self._output:
            self.put(RequestOutput(self.request_id, finish_reason=FinishReason.ERROR, error=message))
        else:
            self.is_finished = True
            self._error = EngineDeadError(message)
            self._wake()

    async def take(self) -> RequestOutput:
        """All new ids as one output; waits for the first. Raises EngineDeadError."""
        while self._output is None:
            if self._error:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        output, self._output = self._output, None
        self._is_read = True
        return output

    def _wake(self) -> None:
        # A plain future costs a third of an event, and this is done for every token.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
