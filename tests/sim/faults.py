"""What each fault of a plan does to the world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from healfs.core.policy import Action, DirectionPolicy, Policy
from healfs.core.states import State
from tests.sim.plan import Fault

if TYPE_CHECKING:
    from tests.sim.world import World

_POLICIES = (
    Policy(),
    Policy(DirectionPolicy(Action.REPORT), DirectionPolicy(Action.REPORT)),
    Policy(DirectionPolicy(), DirectionPolicy(Action.RETRY, 0.2, 1.0)),
    Policy(DirectionPolicy(Action.RETRY, 0.5, 2.0, Action.STOP), DirectionPolicy(Action.ENOSPC)),
    Policy(DirectionPolicy(Action.IGNORE), DirectionPolicy(Action.RETRY, 1.0, 3.0, Action.IGNORE)),
    Policy(DirectionPolicy(), DirectionPolicy(Action.STOP)),
)


_MORE = (
    *_POLICIES,
    Policy(DirectionPolicy(Action.RETRY, 0.2, 1.0), DirectionPolicy(Action.RETRY, 0.2, 2.0)),
    Policy(
        DirectionPolicy(Action.RETRY, 0.1, 8.0, Action.IGNORE),
        DirectionPolicy(Action.RETRY, 5.0, 7.0),
    ),
    Policy(DirectionPolicy(Action.STOP), DirectionPolicy(Action.RETRY, 2.0, 6.0, Action.ENOSPC)),
    Policy(DirectionPolicy(), DirectionPolicy(Action.IGNORE)),
)


def strike(world: World, fault: Fault) -> None:
    server, until, number = world.server, world.now + fault.seconds, fault.number
    match fault.name:
        case "errno":
            server.fail_next, server.which_errno = 1 + number % 4, number >> 4
        case "flush_loses":
            server.fail_flushes = 1 + number % 3
        case "delay":
            server.delay_next = 1 + number % 4
        case "hang":
            server.hang_next = 1 + number % 2
        case "freeze":
            server.frozen_until = until
        case "disconnect":
            world.disconnect(crash=number % 4 != 0, notice=0.001 if number & 16 else 0.05)
        case "away":
            server.away_until = until
            world.disconnect(crash=True, notice=0.001)
        case "relapse":
            server.relapse_until = until
            world.disconnect(crash=True, notice=0.001)
        case "enospc":
            server.full_until = until
        case "refused_entry":
            server.stubborn_until = until
            world.disconnect(crash=True, notice=0.001)
        case "bad_sector":
            server.bad_sectors.add(number % world.plan.sectors)
        case "identity":
            server.other_until = until
            world.disconnect(crash=True, notice=0.001)
        case "policy":
            policies = _MORE if world.plan.options.limits else _POLICIES
            world.set_policy(policies[number % len(policies)])
        case "pause":
            world.engine.pause()
            world.later(fault.seconds, lambda: world.engine.resume())
        case "accept":
            server.other_until = until + 30
            world.disconnect(crash=True, notice=0.001)
            world.later(fault.seconds, world.accept, "replay" if number % 2 else "drop")
        case "short":
            server.short_next = 1 + number % 8
        case "reconnect":
            world.engine.reconnect()
        case "fail":
            world.fail()
        case "worker":
            if world.plan.options.reads_on:  # callers go with it, and it takes a while
                world.callers_go(number)
                server.away_until = max(server.away_until, world.now + 0.05)
            world.worker_dies()
        case "killed":
            _arm(world, number >> 2, ("any", "replay", "replay", "frees")[number % 4])
        case "fua_fails":
            server.fail_fuas = 1 + number % 3
        case "probe":
            server.offline_until = until
        case other:
            raise ValueError(other)


def _arm(world: World, number: int, where: str) -> None:
    """A death anywhere, or where it is hardest to survive: amid what a flush takes away."""
    if where == "any":
        world.stores.arm(number % 40, lambda frees: True)
    elif where == "frees":
        world.stores.arm(number % 6, lambda frees: frees)
    else:
        world.stores.arm(number % 4, lambda frees: world.engine.state is State.REPLAYING)
