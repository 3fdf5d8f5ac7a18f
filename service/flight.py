"""Requests on their way through engines elsewhere, as the gateway sees them. Knows nothing of how they got there."""

from __future__ import annotations

import asyncio

from service.engine.errors import EngineDeadError
from service.engine.request import FinishReason, RequestOutput
from service.wire import merge

_ABORTED = "the engine replica gave the request up"


class EngineLostError(EngineDeadError):
    """The engine that had accepted a request will not end it; another may go on."""


class Flight:
    """What came back for a request and was not read yet.

    The one reader gets every output up to exactly one finished one, or to the loss of the engine, which is an error;
    what comes later is dropped. `request_id` is what the engine knows the request by.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.replica: str | None = None
        self._output: RequestOutput | None = None
        self._loss: EngineLostError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.is_finished = False

    @property
    def is_lost(self) -> bool:
        return self._loss is not None

    @property
    def is_lost_silently(self) -> bool:
        """Whether the engine was lost without anything left to read."""
        return self.is_lost and self._output is None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is waited for."""
        return self.is_finished or self.is_lost

    def put(self, output: RequestOutput) -> None:
        if self.is_over:
            return
        # Nobody aborts a request that still has a reader, unless the replica is going.
        if output.is_engine_failure or output.finish_reason is FinishReason.ABORT:
            if output.new_token_ids:
                self._output = merge(
                    self._output, output._replace(finish_reason=None, error=None, is_engine_failure=False)
                )
            self.lose(output.error or _ABORTED)
            return
        self.is_finished = output.is_finished
        self._output = merge(self._output, output)
        self._wake()

    def lose(self, message: str) -> None:
        """Ends it here: what came before can still be read."""
        if not self.is_over:
            self._loss = EngineLostError(message)
            self._wake()

    async def listen(self) -> None:
        """Waits until there is something to take, or the loss. Nobody may be in `take` meanwhile."""
        while self._output is None and self._loss is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def take(self) -> RequestOutput:
        """All new ids as one output; waits for the first. Raises EngineLostError."""
        await self.listen()
        if self._output is None:
            assert self._loss is not None
            raise self._loss
        output, self._output = self._output, None
        return output

    def _wake(self) -> None:
        # A plain future costs a third of an event, and this is done for every token.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Flights:
    """All of one gateway, by the ids that engines know them by."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._flights

    def add(self, flight: Flight) -> None:
        self._flights[flight.request_id] = flight

    def remove(self, flight: Flight) -> None:
        del self._flights[flight.request_id]

    def put(self, output: RequestOutput) -> None:
        """To the request it came of, unless nobody reads that any more."""
        flight = self._flights.get(output.request_id)
        if flight is not None:
            flight.put(output)

    def lose(self, message: str, replica: str | None = None) -> None:
        """Ends those at a replica, or all."""
        for flight in self._flights.values():
            if replica is None or flight.replica == replica:
                flight.lose(message)

    @property
    def replicas(self) -> set[str]:
        """Where any are."""
        return {flight.replica for flight in self._flights.values() if flight.replica is not None}
