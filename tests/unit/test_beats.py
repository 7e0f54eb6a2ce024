"""When a worker beats, under virtual time: an idle disk is silent, and gives memory back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from healfs.daemon import beats, commands
from healfs.daemon.beats import REST_SECONDS, Beats

IDLE = "idle"


class Jumping(trio.abc.Clock):
    """The loop sleeps, unlike under MockClock's autojump, but no sleep takes any time."""

    def __init__(self) -> None:
        self.now = self.until = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        """To be asked after a sleep only, not by who is told that it begins."""
        self.now = max(self.now, self.until)
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if deadline <= self.now:
            return 0
        self.until = deadline
        return 1e-6


class Ring:
    used = 0
    is_small = True

    def shrink(self) -> None:
        self.is_small = True


class Parent:
    """Heard of beats: when, or IDLE."""

    def __init__(self, may_rest: bool) -> None:
        self.greeting = {"beat": 1.0, "may_rest": may_rest}
        self.told: list[float | str] = []

    def tell(self, message: dict[str, Any]) -> None:
        assert message["do"] == "beat" and message["status"] == "ready"
        self.told.append(IDLE if message["idle"] else trio.current_time())


class World:
    def __init__(self, may_rest: bool = True) -> None:
        self.parent = Parent(may_rest)
        self.ring = Ring()
        self.totals = SimpleNamespace(requests=[0, 0])
        self.channel = SimpleNamespace(held={})
        self.engine = SimpleNamespace(totals=self.totals, log=SimpleNamespace(ring=self.ring))

    def count_unflushed(self) -> None:
        pass


@pytest.fixture(autouse=True)
def ready(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(commands, "summary", lambda worker: "ready")
    assert beats.commands is commands
    yield


def told(world: World, seconds: float, use: float = math.inf) -> list[float | str]:
    """What the keeper hears in so much time; `use`: when a request is answered."""

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Beats(world).beat)  # type: ignore[arg-type]
            if use < seconds:
                await trio.sleep_until(use)
                world.totals.requests[0] += 1
            await trio.sleep_until(seconds)
            nursery.cancel_scope.cancel()

    trio.run(run, clock=Jumping())
    heard = world.parent.told
    return heard[: heard.index(seconds)] if seconds in heard else heard


def test_nothing_is_said_while_nobody_uses_the_disk() -> None:
    assert told(World(), 1000.0) == [0.0, IDLE]


def test_what_wakes_the_loop_is_told_first() -> None:
    heard = told(World(), 1000.0, use=500.5)
    assert heard[:3] == [0.0, IDLE, 500.5]
    assert heard[3:] in ([IDLE], [500.5, IDLE])  # the beating task came first, or last


def test_a_disk_that_holds_requests_is_not_idle() -> None:
    world = World()
    world.channel.held = {1: object()}
    assert told(world, 10.5) == [float(second) for second in range(11)]


def test_a_keeper_that_knows_no_rest_hears_beats() -> None:
    assert told(World(may_rest=False), 9.5) == [float(second) for second in range(10)]


@pytest.mark.parametrize("used", [0, 4096])
def test_an_empty_log_gives_its_memory_back(used: int) -> None:
    """And nothing wakes the processes after that."""
    world = World()
    world.ring.is_small, world.ring.used = False, used
    heard = told(world, 10 * REST_SECONDS)
    assert world.ring.is_small == (not used)
    assert heard == [0.0, IDLE] + ([] if used else [1.0 + REST_SECONDS, IDLE])
