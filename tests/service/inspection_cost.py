"""What a look into an engine costs the event loop it is made on: `python -m tests.service.inspection_cost`.

Milliseconds for the map of blocks and the requests, and for the tiles that the dashboard makes of the map.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.inspection import inspect_requests
from service.engine.scheduler import Scheduler
from service.engine.sequence import RequestStatus, Sequence
from service.gateway.dashboard import tiles_of
from tests.engine.scripted import make_request, make_scheduler

BLOCK_SIZE = 32


def microseconds(function: Callable[[], object], num_calls: int) -> float:
    """The best of a few runs: what other processes do makes it only longer."""
    best = float("inf")
    for _ in range(7):
        started_s = time.process_time()
        for _ in range(num_calls):
            function()
        best = min(best, time.process_time() - started_s)
    return best / num_calls * 1e6


def scheduler_with(num_blocks: int, num_seqs: int, num_held: int) -> Scheduler:
    """A scheduler whose running sequences hold `num_held` of its blocks together."""
    scheduler = make_scheduler(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs
    )
    for number in range(num_seqs):
        sequence = Sequence(make_request(f"r{number}"), 0.0)
        scheduler.blocks.take_slot(sequence)
        scheduler.blocks.grow(sequence, num_held // num_seqs * BLOCK_SIZE + 1)
        sequence.status = RequestStatus.RUNNING
        scheduler.running.append(sequence)
    return scheduler


def main() -> None:
    for num_blocks, num_seqs, num_held in ((1024, 64, 512), (100_000, 64, 1024), (100_000, 256, 99_840)):
        scheduler = scheduler_with(num_blocks, num_seqs, num_held)
        blocks = inspect_requests(scheduler, 0.0)[1]
        looking = microseconds(lambda scheduler=scheduler: inspect_requests(scheduler, 0.0), 5) / 1000
        drawing = microseconds(lambda blocks=blocks: tiles_of(blocks), 5) / 1000
        print(f"{num_blocks} blocks, {num_held} held by {num_seqs}: {looking:.2f} ms to look, {drawing:.2f} to draw")


if __name__ == "__main__":
    main()
