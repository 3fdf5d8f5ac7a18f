"""What is done to a server under load. Each case breaks something and waits until all is whole."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from loadtests.chaos.crowd import Crowd
from loadtests.chaos.question import question_of
from loadtests.chaos.reading import Choice, Outcome, Reading
from loadtests.chaos.stage import Stage
from loadtests.errors import ServerError

WHOLE_TIMEOUT_S = 90.0
STOPPED_S = 12.0
CONTROLLER_STOPPED_S = 6.0
_FLOOD = 150
# One prompt of this salt kills its replica: an order that engines of the fault suite know and no others.
POISON_SALT = "kill-this-replica"


@dataclass(frozen=True, slots=True)
class Blow:
    """What was broken, and how many seconds later all was whole again."""

    recovered_s: float
    note: str = ""


Strike = Callable[[Stage, Crowd, random.Random], Awaitable[Blow]]


@dataclass(frozen=True, slots=True)
class Case:
    """What is done. `is_on_nodes`: to gateways and engines on two nodes of Ray, else to one gateway and its engines.

    `may_cut`: connections may end, those of a gateway that is broken.
    """

    what: str
    strike: Strike
    is_on_nodes: bool = False
    may_cut: bool = False


async def kill_replica(stage: Stage, _: Crowd, rng: random.Random) -> Blow:
    victim = rng.choice(stage.engines())
    await stage.until_busy()
    stage.give_up(victim)
    stage.signal(victim, signal.SIGKILL)
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S))


async def kill_all_replicas(stage: Stage, _: Crowd, __: random.Random) -> Blow:
    victims = stage.engines()
    await stage.until_busy()
    stage.give_up(*victims)
    for victim in victims:
        stage.signal(victim, signal.SIGKILL)
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S))


async def stop_replica(stage: Stage, crowd: Crowd, rng: random.Random) -> Blow:
    """Stopped, not ended: its connections stay open. It comes back later, and what it says then is nobody's."""
    victim = rng.choice(stage.engines())
    await stage.until_busy()
    before = crowd.tally.counts[Outcome.FINISHED]
    stage.signal(victim, signal.SIGSTOP)
    try:
        await asyncio.sleep(STOPPED_S)
    finally:
        stage.signal(victim, signal.SIGCONT)
    meanwhile = crowd.tally.counts[Outcome.FINISHED] - before
    return Blow(STOPPED_S + await stage.until_whole(WHOLE_TIMEOUT_S), f"{meanwhile} answers while it was stopped")


async def kill_controller(stage: Stage, _: Crowd, __: random.Random) -> Blow:
    victim = stage.controller()
    stage.give_up(victim)
    stage.signal(victim, signal.SIGKILL)
    recovered_s = await _until_controlled(stage)
    return Blow(recovered_s + await stage.until_whole(WHOLE_TIMEOUT_S))


async def stop_controller(stage: Stage, _: Crowd, __: random.Random) -> Blow:
    victim = stage.controller()
    stage.signal(victim, signal.SIGSTOP)
    try:
        await asyncio.sleep(CONTROLLER_STOPPED_S)
    finally:
        stage.signal(victim, signal.SIGCONT)
    return Blow(CONTROLLER_STOPPED_S + await stage.until_whole(WHOLE_TIMEOUT_S))


async def fail_step(stage: Stage, _: Crowd, rng: random.Random) -> Blow:
    return await _order(stage, "raise", rng)


async def hang_step(stage: Stage, _: Crowd, rng: random.Random) -> Blow:
    return await _order(stage, "hang", rng)


async def poison(stage: Stage, crowd: Crowd, _: random.Random) -> Blow:
    """A request that kills whatever replica begins it. It has to end with an error of its own, and others with none."""
    before = set(stage.engines())
    deadly = question_of("poison", {"prompt": "The last lamp", "max_tokens": 20, "cache_salt": POISON_SALT})
    unanswerable = Reading({0: Choice("", "", ("never",))}, None, (), is_ended=True)
    result = await crowd.ask(deadly, unanswerable)
    num_lost = len(before - set(stage.engines()))
    stage.give_up(*(before - set(stage.engines())))
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S), f"poison {result.value}, {num_lost} replicas lost to it")


async def fill_memory(stage: Stage, crowd: Crowd, rng: random.Random) -> Blow:
    """More requests at once than memory holds, and then than may wait."""
    before = await stage.count("mosaic_num_preemptions_total")
    await asyncio.gather(*(crowd.ask(*rng.choice(crowd.asked)) for _ in range(_FLOOD)))
    preemptions = await stage.count("mosaic_num_preemptions_total") - before
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S), f"{_FLOOD} more at once, {preemptions:.0f} preemptions")


async def read_slowly(stage: Stage, crowd: Crowd, rng: random.Random) -> Blow:
    """Clients that stop reading in the middle of long streams, and go on, or never do."""
    num_read, num_left = await crowd.dawdle(rng)
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S), f"{num_read} readers paused and went on, {num_left} hung up")


async def redeploy(stage: Stage, _: Crowd, __: random.Random) -> Blow:
    before = stage.engines()
    await stage.until_busy()
    stage.order(f"replicas-{stage.num_replicas}")
    stage.give_up(*before)
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S))


async def scale_down(stage: Stage, _: Crowd, __: random.Random) -> Blow:
    """To one replica; the others finish what they have. Then back."""
    await stage.until_busy()
    number = stage.num_replicas
    stage.num_replicas = 1
    stage.order("replicas-1")
    try:
        smaller_s = await stage.until_whole(WHOLE_TIMEOUT_S)
    finally:
        stage.num_replicas = number
        stage.order(f"replicas-{number}")
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S), f"down after {smaller_s:.1f} s, then up again")


async def kill_gateway(stage: Stage, crowd: Crowd, rng: random.Random) -> Blow:
    return await _break_gateway(stage, crowd, rng, signal.SIGKILL)


async def stop_gateway(stage: Stage, crowd: Crowd, rng: random.Random) -> Blow:
    """Stopped for good: it has to be found out and ended, and with it its connections."""
    return await _break_gateway(stage, crowd, rng, signal.SIGSTOP)


async def kill_node(stage: Stage, crowd: Crowd, _: random.Random) -> Blow:
    """All processes of it at once, an engine among them, as when a machine goes."""
    victims = stage.second_node()
    num_lost = len(set(victims) & set(stage.engines()))
    await stage.until_busy()
    before = crowd.tally.counts[Outcome.FINISHED]
    stage.give_up(*victims)
    for victim in victims:
        stage.signal(victim, signal.SIGKILL)
    recovered_s = await stage.until_whole(WHOLE_TIMEOUT_S)
    meanwhile = crowd.tally.counts[Outcome.FINISHED] - before
    return Blow(recovered_s, f"{len(victims)} processes, {num_lost} of them engines; {meanwhile} answers meanwhile")


CASES: dict[str, Case] = {
    "kill-replica": Case("SIGKILL of one of two replicas", kill_replica),
    "kill-all": Case("SIGKILL of all replicas at once", kill_all_replicas),
    "stop-replica": Case(f"SIGSTOP of a replica, SIGCONT after {STOPPED_S:g} s", stop_replica),
    "kill-controller": Case("SIGKILL of the Serve controller", kill_controller),
    "stop-controller": Case(f"SIGSTOP of the controller, SIGCONT after {CONTROLLER_STOPPED_S:g} s", stop_controller),
    "step-raises": Case("an engine step raises", fail_step),
    "step-hangs": Case("an engine step never ends", hang_step),
    "poison": Case("a request that kills its replica", poison),
    "full-memory": Case("more requests than memory holds", fill_memory),
    "slow-clients": Case("clients that stop reading", read_slowly),
    "redeploy": Case("all replicas replaced by a new deployment", redeploy),
    "scale-down": Case("from two replicas to one, and back", scale_down),
    "kill-node": Case("SIGKILL of a second Ray node, with an engine", kill_node, is_on_nodes=True),
    "kill-gateway": Case("SIGKILL of one of two gateways", kill_gateway, is_on_nodes=True, may_cut=True),
    "stop-gateway": Case("SIGSTOP of one of two gateways, for good", stop_gateway, is_on_nodes=True, may_cut=True),
}


async def _order(stage: Stage, what: str, rng: random.Random) -> Blow:
    victim = rng.choice(stage.engines())
    await stage.until_busy()
    stage.give_up(victim)
    stage.order(f"{what}-{victim}")
    return Blow(await stage.until_whole(WHOLE_TIMEOUT_S))


async def _break_gateway(stage: Stage, crowd: Crowd, rng: random.Random, how: signal.Signals) -> Blow:
    victim = rng.choice(stage.gateways())
    await stage.until_busy()
    before = crowd.tally.counts[Outcome.FINISHED]
    stage.give_up(victim)
    stage.signal(victim, how)
    recovered_s = await stage.until_whole(WHOLE_TIMEOUT_S)
    meanwhile = crowd.tally.counts[Outcome.FINISHED] - before
    return Blow(recovered_s, f"{meanwhile} answers until there were two again")


async def _until_controlled(stage: Stage) -> float:
    for tenths in range(int(WHOLE_TIMEOUT_S * 10)):
        try:
            stage.controller()
        except ServerError:
            await asyncio.sleep(0.1)
        else:
            return tenths / 10
    raise ServerError("no Serve controller came back")
