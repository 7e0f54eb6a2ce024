"""Turns: what is served without the event loop between, and when it gets its turn again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from healfs.daemon import turns
from healfs.daemon.turns import Turns

Event = Callable[[], int]


class Connection:
    """A base.Polled on an eventfd: each count in it is a completion."""

    blocked = False

    def __init__(self, fd: int) -> None:
        self.ready_fd = fd
        self.completions = 0
        self.attended = False
        self.on_completion: Callable[[], None] = lambda: None

    def poll(self) -> bool:
        assert self.attended  # else what comes after it may not be looked for
        try:
            os.eventfd_read(self.ready_fd)
        except BlockingIOError:
            return False
        self.completions += 1
        self.on_completion()
        return True

    def attend(self, attended: bool) -> None:
        assert attended is not self.attended
        self.attended = attended


class World:
    """A channel, whose descriptor is an eventfd with a count for each request, and a backend."""

    def __init__(self, fuse: int) -> None:
        self.fuse = fuse
        self.received = 0
        self.answered = 0
        self.others = False
        self.alive = True
        self.polled: Connection | None = None
        self.commits = 0
        self.closed = 0
        self.on_request: Callable[[], None] = lambda: None

    def drain(self) -> bool:
        try:
            count = os.eventfd_read(self.fuse)
        except BlockingIOError:
            return self.alive
        for _ in range(count):
            self.received += 1
            self.on_request()
        return self.alive

    def answer(self) -> None:
        self.answered += 1

    def commit(self) -> None:
        self.commits += 1

    def close(self) -> None:
        self.closed += 1

    def turns(self) -> Turns:
        return Turns(self, self, self.commit)  # type: ignore[arg-type]


@pytest.fixture
def event() -> Iterator[Event]:
    made: list[int] = []

    def make() -> int:
        made.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def world(event: Event, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(turns, "LONGEST", 3600.0)  # a loaded machine does not end a turn
    return World(event())


def ask(world: World, count: int = 1) -> None:
    os.eventfd_write(world.fuse, count)


def test_what_comes_while_an_answer_is_given_is_served_in_the_same_turn(world: World) -> None:
    def on_request() -> None:
        world.answer()
        if world.received < 5:
            ask(world)

    world.on_request = on_request
    ask(world)
    assert world.turns().run()
    assert world.received == 5


def test_a_completion_is_waited_for(world: World, event: Event) -> None:
    connection = world.polled = Connection(event())
    connection.on_completion = world.answer
    world.on_request = lambda: os.eventfd_write(connection.ready_fd, 1)
    ask(world, 3)
    assert world.turns().run()
    assert world.answered == 1 and connection.completions == 1  # all three in one
    assert not connection.attended


def test_the_request_that_a_completion_brings_is_served_in_the_same_turn(
    world: World, event: Event
) -> None:
    connection = world.polled = Connection(event())

    def completed() -> None:
        world.answer()
        if world.received < 4:
            ask(world)

    connection.on_completion = completed
    world.on_request = lambda: os.eventfd_write(connection.ready_fd, 1)
    ask(world)
    assert world.turns().run()
    assert world.received == world.answered == 4


def test_after_a_reconnect_the_new_connection_is_watched(world: World, event: Event) -> None:
    old, new = Connection(event()), Connection(event())
    old.on_completion = new.on_completion = world.answer
    turn = world.turns()
    for world.polled in (old, new):
        connection = world.polled
        ask(world)
        world.on_request = lambda fd=connection.ready_fd: os.eventfd_write(fd, 1)
        assert turn.run()
    assert (old.completions, new.completions) == (1, 1)
    os.eventfd_write(old.ready_fd, 1)  # something late on the old one: nobody's any more
    ask(world)
    assert turn.run()
    assert old.completions == 1 and not old.attended and not new.attended


def test_the_end_of_the_mount(world: World) -> None:
    world.alive = False
    assert not world.turns().run()


def test_what_is_for_another_task_ends_the_turn(world: World) -> None:
    def on_request() -> None:
        world.answer()
        world.others = True
        ask(world)

    world.on_request = on_request
    ask(world)
    assert world.turns().run()
    assert world.received == 1
    assert world.commits == 1


def test_a_turn_ends_while_requests_keep_coming(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LONGEST", 0.001)

    def on_request() -> None:
        world.answer()
        ask(world)

    world.on_request = on_request
    ask(world)
    assert world.turns().run()


def test_a_bug_in_the_backend_costs_the_connection(world: World, event: Event) -> None:
    connection = world.polled = Connection(event())

    def completed() -> None:
        raise ZeroDivisionError

    connection.on_completion = completed
    world.on_request = lambda: os.eventfd_write(connection.ready_fd, 1)
    ask(world)
    assert world.turns().run()
    assert world.closed == 1 and not connection.attended


class Epoll:
    """The next request comes so many seconds after the last, on a clock that each look moves on; a
    look is a drain here. What comes while it sleeps wakes it."""

    def __init__(self, world: World, waits: list[float]) -> None:
        self.now = 0.0
        self.due = waits.pop(0)
        self.waits = waits
        self.world = world
        self.looks = [0]  # for each request, before the turn slept
        self.slept = 0
        self.asleep = False

    def take_the_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        epoll = SimpleNamespace(epoll=lambda: self, EPOLLIN=1)
        for name, stand_in in (("select", epoll), ("time", self), ("os", self)):
            monkeypatch.setattr(turns, name, stand_in)
        monkeypatch.setattr(self.world, "drain", self.drain)

    def register(self, fd: int, events: int) -> None:
        pass

    def monotonic(self) -> float:
        return self.now

    def drain(self) -> bool:
        if self.now >= self.due:
            self.world.received += 1
            self.world.answer()
            self.due = self.now + self.waits.pop(0) if self.waits else math.inf
            self.looks.append(0)
            self.asleep = False
        return True

    def sched_yield(self) -> None:
        assert not self.asleep
        self.now += turns.SPIN / 10
        self.looks[-1] += 1

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.slept += 1
        self.asleep = True
        if self.due == math.inf:
            return []
        self.now = max(self.now, self.due)
        return [(0, 1)]


def test_it_looks_before_it_sleeps_while_that_pays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that takes its time costs no CPU: after three waits in vain it sleeps at once."""
    soon, late = turns.SPIN / 2, turns.SPIN * 10
    waits = [soon, late, soon, late, late, late, late, late, soon, soon, late]
    epoll = Epoll(world, list(waits))
    epoll.take_the_place(monkeypatch)
    assert world.turns().run()
    found = [looks > 0 for looks in epoll.looks]
    assert found == [True] * 6 + [False] * 3 + [True] * 3
    assert all(looks <= 11 for looks in epoll.looks)
    # Each long wait; of the last short ones the first, as it slept then; and the end of the turn.
    assert epoll.slept == waits.count(late) + 1 + 1


def test_a_backend_that_is_slow_each_time_costs_no_cpu(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn begins with a request that nobody waited for: that is no wait that paid."""
    epoll = Epoll(world, [0.0])
    epoll.take_the_place(monkeypatch)
    turn = world.turns()
    for _ in range(8):
        epoll.due = epoll.now
        assert turn.run()
    assert [looks > 0 for looks in epoll.looks] == [False] + [True] * 3 + [False] * 5
