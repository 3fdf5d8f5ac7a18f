"""What waits for a gateway's stream: whole steps for a reader that keeps up, merged ones for one that does not."""

from __future__ import annotations

import asyncio

from service.engine.request import FinishReason, RequestOutput
from service.engine.stats import EngineHealth, EngineStats
from service.mailbox import Mailbox
from service.wire import Pulse, unpack


async def read(mailbox: Mailbox) -> tuple[list[RequestOutput], Pulse | None]:
    message = await asyncio.wait_for(mailbox.take(), 60)
    return [unpack(item) for item in message.outputs], message.pulse


async def test_a_step_is_one_message() -> None:
    mailbox = Mailbox()
    reader = asyncio.create_task(read(mailbox))
    await asyncio.sleep(0)
    outputs = [RequestOutput(name, (n,)) for n, name in enumerate("abc")]
    for output in outputs:
        mailbox.put(output)
    assert await reader == (outputs, None)


async def test_what_a_late_reader_gets_is_bounded_by_the_requests() -> None:
    mailbox = Mailbox()
    for step in range(100):
        for name in "ab":
            mailbox.put(RequestOutput(name, (step,)))
    mailbox.put(RequestOutput("a", (100,), FinishReason.LENGTH))
    (a, b), _ = await read(mailbox)
    assert a == RequestOutput("a", tuple(range(101)), FinishReason.LENGTH)
    assert b == RequestOutput("b", tuple(range(100)))


async def test_only_the_latest_pulse_is_read_once() -> None:
    mailbox = Mailbox()
    pulses = [Pulse(EngineHealth(True), EngineStats("r", num_steps=n)) for n in range(2)]
    for pulse in pulses:
        mailbox.beat(pulse)
    assert await read(mailbox) == ([], pulses[1])
    mailbox.put(RequestOutput("a", (1,)))
    assert await read(mailbox) == ([RequestOutput("a", (1,))], None)


async def test_what_was_put_before_the_end_is_still_read() -> None:
    mailbox = Mailbox()
    mailbox.put(RequestOutput("a", (1,)))
    mailbox.close()
    assert not mailbox.is_closed
    assert await read(mailbox) == ([RequestOutput("a", (1,))], None)
    assert mailbox.is_closed


async def test_the_end_wakes_a_waiting_reader() -> None:
    mailbox = Mailbox()
    reader = asyncio.create_task(read(mailbox))
    await asyncio.sleep(0)
    mailbox.close()
    assert await reader == ([], None)
    assert mailbox.is_closed


async def test_log_lines_are_read_once_and_bounded() -> None:
    mailbox = Mailbox()
    for n in range(1000):
        mailbox.log(f"line {n}")
    lines = (await mailbox.take()).log
    assert len(lines) == 100
    assert lines[-1] == "line 999"
    mailbox.put(RequestOutput("a", (1,)))
    assert (await mailbox.take()).log == ()
