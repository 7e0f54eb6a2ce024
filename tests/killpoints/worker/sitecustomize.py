"""Has a healfs worker die or fail at a named point; see tests/killpoints/__init__.py.

On PYTHONPATH only where a test puts it: nothing in healfs knows of it. HEALFS_KILL_POINTS is a
directory with the files `armed` ("NAME COUNT MANNER", COUNT the passing of the point that counts;
behind a semicolon, the same for the successor), `reached` (a JSON object a line, written before the
end) and, while a test holds back the take-over, `gate`.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTORY = Path(os.environ.get("HEALFS_KILL_POINTS", "/nonexistent"))


class Points:
    def __init__(self) -> None:
        with open(DIRECTORY / "armed", "r+b") as file:
            self.armed = mmap.mmap(file.fileno(), 0)
        self.engine: Any = None
        self.channel: Any = None
        self.passed = 0

    def is_armed(self, name: str) -> bool:
        return self.armed[:].startswith(name.encode() + b" ")

    def passing(self, name: str) -> None:
        """The one call at each point."""
        if not self.is_armed(name):
            return
        self.passed += 1
        mine, _, successors = self.armed[:].rstrip(b"\0").partition(b";")
        _, count, manner = mine.split()
        if self.passed >= int(count):
            self.armed[:] = successors.ljust(len(self.armed), b"\0")
            self._fail(name, manner.decode())

    def _fail(self, name: str, manner: str) -> None:
        channel = self.channel
        reached = {
            "point": name,
            "pid": os.getpid(),
            "held": 0 if channel is None else len(channel.held),  # not answered to the kernel
            "state": str(self.engine.state),
        }
        with open(DIRECTORY / "reached", "a") as file:
            file.write(json.dumps(reached) + "\n")
        if manner == "raise":
            raise RuntimeError("planted")
        if manner == "memory":
            raise MemoryError("planted")
        os.kill(os.getpid(), signal.Signals[manner])

    def before(self, owner: Any, method: str, name: str, matters: Callable[..., object]) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def wrapped(self_: Any, *arguments: Any) -> Any:
            if matters(*arguments):
                self.passing(name)
            return original(self_, *arguments)

        setattr(owner, method, wrapped)

    def after(self, owner: Any, method: str, name: str, matters: Callable[..., object]) -> None:
        """`matters(result, *arguments)`."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def wrapped(self_: Any, *arguments: Any) -> Any:
            result = original(self_, *arguments)
            if matters(result, *arguments):
                self.passing(name)
            return result

        setattr(owner, method, wrapped)

    def remember(self, owner: Any, name: str) -> None:
        original = owner.__init__

        def wrapped(self_: Any, *arguments: Any, **named: Any) -> None:
            original(self_, *arguments, **named)
            setattr(self, name, self_)

        owner.__init__ = wrapped


def _always(*_: object) -> bool:
    return True


def _install(points: Points) -> None:
    from healfs.core.engine import Engine
    from healfs.core.replay import Replay
    from healfs.core.request import Kind
    from healfs.core.writelog import WriteLog
    from healfs.daemon.parent import Parent
    from healfs.fuse.channel import Channel

    def is_write(request: Any, errno: int, *_: object) -> bool:
        return request.kind is Kind.WRITE and not request.internal and not errno

    def others_wait(*_: object) -> bool:
        return points.channel is not None and bool(points.channel.held)

    points.remember(Engine, "engine")
    points.remember(Channel, "channel")
    points.before(Engine, "completed", "backend-completed", is_write)
    points.after(WriteLog, "enter", "log-entry", lambda entered, _: entered)
    points.after(WriteLog, "complete", "completed-entry", _always)
    points.before(Channel, "_answer_write", "reply", _always)
    points.after(Channel, "_answer_write", "replied", others_wait)
    points.after(Replay, "written", "replay", _always)
    points.before(Engine, "_replay_flushed", "replay-flushed", lambda _, errno: not errno)
    points.after(Engine, "take_over", "take-over", _always)
    points.after(Engine, "_submit_again", "resent", _always)
    points.before(Engine, "connect_failed", "outage", others_wait)
    points.before(Channel, "_write", "received", others_wait)
    points.before(Parent, "tell", "beat", lambda said: said["do"] == "beat" and others_wait())
    _half_entry(points, WriteLog)
    _in_trim(points, WriteLog)
    _gate(Channel)


def _half_entry(points: Points, log: Any) -> None:
    """The record is written, its state not yet."""

    class Words:
        def __init__(self, view: memoryview) -> None:
            self.view = view

        def __setitem__(self, at: int, value: int) -> None:
            if not at % 8:
                points.passing("half-entry")
            self.view[at] = value

    original = log.__init__

    def wrapped(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self._words = Words(self._words)

    log.__init__ = wrapped


def _in_trim(points: Points, log: Any) -> None:
    """Some of what the flush covers is out of the log, the rest is in it."""

    class Trimmed(deque):  # type: ignore[type-arg]
        def popleft(self) -> Any:
            points.passing("trim")
            return super().popleft()

    original = log.trim

    @functools.wraps(original)
    def trim(self: Any, *arguments: Any) -> None:
        if points.is_armed("trim"):
            points.passed = 0
        self._completed = Trimmed(self._completed)
        original(self, *arguments)
        self._completed = deque(self._completed)

    log.trim = trim


def _gate(channel: Any) -> None:
    original = channel._take_over

    async def take_over(self: Any) -> None:
        import trio

        while (DIRECTORY / "gate").exists():  # noqa: ASYNC110 - a file tells
            await trio.sleep(0.01)
        await original(self)

    channel._take_over = take_over


if "healfs.daemon.worker" in sys.orig_argv:
    _install(Points())
