"""What is there before the first request is not looked through again while others are answered."""

from __future__ import annotations

import sys

from tests.service.process import ServerProcess

# At its end the server tells how many objects its collector leaves alone, and how many it looks after.
TOLD_AT_THE_END = """
import atexit, gc
atexit.register(lambda: print("frozen", gc.get_freeze_count(), "of", gc.get_freeze_count() + len(gc.get_objects())))
from service.cli import main
main()
"""


def test_what_was_loaded_before_the_first_request_is_frozen() -> None:
    command = (sys.executable, "-c", TOLD_AT_THE_END, "serve")
    with ServerProcess("--local", "--threads", "1", command=command) as server:
        server.stop()
        _, frozen, _, there = server.output.strip().rpartition("\n")[2].split()
    assert int(frozen) > 100_000
    assert int(frozen) > 0.9 * int(there)
