"""What the reader of one request has been given, over however many replicas, and what to ask the next one for.

Knows neither replicas nor how a request gets to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from service.engine.request import FinishReason, Request, RequestOutput, RequestTiming

# Of replicas lost in a row without a token between: a request that brings them down does so at the same place.
MAX_LOSSES_IN_PLACE = 3
MAX_LOSSES = 10


class Delivery:
    """Books every output on its way to the reader, so that they read as one answer though several engines gave it.

    Ids that an engine is asked to go by are different each time: what a replica believed lost still says belongs to
    nobody. Time in which no replica had the request counts as waiting before the first output, as decoding after it.
    """

    def __init__(self, request: Request, clock: Callable[[], float] = time.monotonic) -> None:
        self._request = request
        self._clock = clock
        self._started_s = clock()
        self._asked_s = self._started_s
        self._num_asked = 0
        self._ids: list[int] = []
        self._first_s: float | None = None
        self._first_timing: RequestTiming | None = None
        self._num_losses_in_place = 0
        self._num_ids_at_loss = 0
        self._num_untold = 0
        self._is_culprit = False
        self.num_losses = 0
        self.lost_replicas: set[str] = set()
        self._replica = ""
        self._system_fingerprint = ""

    @property
    def has_output(self) -> bool:
        return self._first_s is not None

    @property
    def system_fingerprint(self) -> str:
        """Of the engines that can go on with what the reader has; empty where any can, because there is nothing."""
        return self._system_fingerprint if self.has_output else ""

    @property
    def num_tokens(self) -> int:
        """Ids given to the reader."""
        return len(self._ids)

    @property
    def time_left_s(self) -> float | None:
        """Until the request's deadline, not below 0; None where it has none."""
        return self._request.later(self._clock() - self._started_s).timeout_s

    @property
    def request_id(self) -> str:
        """The reader's."""
        return self._request.request_id

    def next_id(self) -> str:
        """What the request is called the next time it is sent."""
        self._num_asked += 1
        return self.request_id if self._num_asked == 1 else f"{self.request_id}~{self._num_asked}"

    def rest(self, request_id: str) -> Request:
        """What is left to do at this moment, as a request with that id."""
        self._asked_s = self._clock()
        request = replace(self._request.later(self._asked_s - self._started_s), request_id=request_id)
        if not self.num_losses:
            return request
        sampling = request.sampling
        if self.has_output:
            sampling = replace(sampling, num_prompt_logprobs=None)
        return replace(request, output_token_ids=self._known_ids(), sampling=sampling, is_resumed=True)

    @property
    def is_culprit(self) -> bool:
        return self._is_culprit

    def accuse(self) -> None:
        """A second engine was lost when this request alone began there: it is not tried a third time."""
        self._is_culprit = True

    def lose(self) -> bool:
        """The engine that had the request is lost. False where the request had better end, being lost too often."""
        self.num_losses += 1
        self.lost_replicas.add(self._replica)
        is_in_place = self.num_losses > 1 and self.num_tokens == self._num_ids_at_loss
        self._num_losses_in_place = self._num_losses_in_place + 1 if is_in_place else 1
        self._num_ids_at_loss = self.num_tokens
        is_hopeless = self._num_losses_in_place >= MAX_LOSSES_IN_PLACE or self.num_losses >= MAX_LOSSES
        return not (self._is_culprit or is_hopeless)

    def accepted(self, replica: str, system_fingerprint: str) -> None:
        """A replica has taken the rest. Where another had it before, the next output tells of that."""
        self._replica, self._system_fingerprint = replica, system_fingerprint
        self._num_untold += self.num_losses > 0

    def book(self, output: RequestOutput) -> RequestOutput:
        """`output` as its reader should see it."""
        is_first = not self.has_output
        self._ids += output.new_token_ids
        if self.num_losses:
            output = self._as_one(output, is_first)
        if is_first:
            output = output._replace(system_fingerprint=self._system_fingerprint)
            self._first_s = self._clock()
            self._first_timing = output.timing
        return output

    def end(self, reason: FinishReason, error: str | None = None) -> RequestOutput:
        """A last output that no engine gives."""
        return RequestOutput(self.request_id, finish_reason=reason, error=error, num_resumptions=self._take_untold())

    def _known_ids(self) -> tuple[int, ...]:
        return (*self._request.output_token_ids, *self._ids)

    def _as_one(self, output: RequestOutput, is_first: bool) -> RequestOutput:
        """An output after a loss: what only the first one tells is left out of the others."""
        output = output._replace(
            request_id=self.request_id,
            timing=self._whole_timing(output, is_first),
            num_resumptions=self._take_untold(),
        )
        return output if is_first else output._replace(prompt_logprobs=None, num_cached_tokens=0)

    def _whole_timing(self, output: RequestOutput, is_first: bool) -> RequestTiming | None:
        if output.timing is None:
            return None
        if is_first:
            return replace(output.timing, queued_s=output.timing.queued_s + self._asked_s - self._started_s)
        if not output.is_finished or self._first_timing is None or self._first_s is None:
            return None
        return replace(self._first_timing, decode_s=self._clock() - self._first_s)

    def _take_untold(self) -> int:
        num_untold, self._num_untold = self._num_untold, 0
        return num_untold
