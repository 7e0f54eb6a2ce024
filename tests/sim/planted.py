"""Bugs planted on purpose: each must be found within a bounded number of seeds.

A bug is a subclass of the engine, or a changed function, and the options under which it shows.
They go through the public interface where they can, so that they outlive changes inside.
"""

from __future__ import annotations

import errno as e
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from healfs.core.engine import Engine
from healfs.core.overlap import Overlap
from healfs.core.request import Kind, Phase, Request
from tests.sim.plan import TODAY, Options, Plan
from tests.sim.world import World


@dataclass(frozen=True)
class Bug:
    name: str
    rules: tuple[str, ...]  # what the oracle may call it
    engine: type[Engine] = Engine
    options: Options = TODAY
    patch: Callable[[], Any] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def planted(self) -> Iterator[Callable[[Plan, list[str] | None], World]]:
        """Gives what makes the world with the bug in it."""

        def make(plan: Plan, trace: list[str] | None) -> World:
            return World(plan, self.engine, trace, **self.keywords)

        if self.patch is None:
            yield make
        else:
            with self.patch():
                yield make


class OrderIgnoredByReads(Engine):
    def submit(self, request: Request) -> None:
        if request.kind is Kind.READ:
            request.start = request.end
        super().submit(request)


class FuaIgnored(Engine):
    """O_DSYNC ignored: the write goes out as any other, and is answered as any other."""

    def submit(self, request: Request) -> None:
        request.fua = False
        super().submit(request)


class TrimForZeroes(Engine):
    def submit(self, request: Request) -> None:
        if request.kind is Kind.WRITE_ZEROES:
            request.kind = Kind.DISCARD
        super().submit(request)


class DoubleAnswer(Engine):
    """What was answered when it was cancelled in flight is answered again when it completes."""

    def cancel(self, request: Request, errno: int = e.EINTR) -> None:
        if request.phase is Phase.IN_FLIGHT and not request.answered:
            request.on_answer(request, errno, None)
        else:
            super().cancel(request, errno)


class LostAnswer(Engine):
    """A completion that comes for a second attempt at a flush is taken for an old one."""

    def completed(self, request: Request, errno: int, data: object = None) -> None:
        if request.kind is not Kind.FLUSH or request.attempts < 2:
            super().completed(request, errno, data)


class EarlyAnswer(Engine):
    """A write that is sent again is taken for done: it was sent once already."""

    def completed(self, request: Request, errno: int, data: object = None) -> None:
        again = request.kind is Kind.WRITE and errno in (e.EIO, e.ENOSPC)
        super().completed(request, 0 if again else errno, data)


class FlushAnsweredOnError(Engine):
    def completed(self, request: Request, errno: int, data: object = None) -> None:
        super().completed(request, 0 if request.kind is Kind.FLUSH else errno, data)


class GivesUp(Engine):
    """An outage is handed to the guest against the policy."""

    def lost(self, errno: int, reason: str = "") -> None:
        super().lost(errno, reason)
        self.fail_all()


class WrongIdentityAccepted(Engine):
    def connected(self, size: int, **keywords: Any) -> None:
        super().connected(size, **(keywords | {"mismatch": ""}))


class ReleasedTooEarly(Engine):
    """A cancelled write's payload is let go while the backend still reads it."""

    def cancel(self, request: Request, errno: int = e.EINTR) -> None:
        flying = request.phase is Phase.IN_FLIGHT and not request.answered
        super().cancel(request, errno)
        if flying:
            self.effects.release(request)


class NoReplay(Engine):
    """A flush is retried after a reconnect, and nothing was written again: what QEMU's NBD
    client with reconnect-delay and nbdkit's retry filter do."""

    def connected(self, size: int, **keywords: Any) -> None:
        if "volatile_cache" in keywords:
            keywords["volatile_cache"] = False
        super().connected(size, **keywords)


LOSSES = replace(TODAY, cache_loss=True)

BUGS = (
    Bug(
        "overlap ignored",
        ("stale read", "stable"),
        patch=lambda: mock.patch.object(Overlap, "find", lambda self, start, end: []),
    ),
    Bug("reads do not wait for writes", ("stale read",), OrderIgnoredByReads),
    Bug("O_DSYNC ignored", ("stable",), FuaIgnored),
    Bug("TRIM sent for zeroes", ("stale read", "stable"), TrimForZeroes),
    Bug("double answer", ("double answer",), DoubleAnswer),
    Bug("lost answer", ("lost answer",), LostAnswer),
    Bug("a failed write answered as done", ("stale read", "stable"), EarlyAnswer),
    Bug("a failed flush answered as done", ("stable",), FlushAnsweredOnError),
    Bug("an outage handed to the guest", ("error",), GivesUp),
    Bug("wrong identity accepted", ("sent nowhere",), WrongIdentityAccepted),
    Bug("payload released too early", ("released twice", "garbage"), ReleasedTooEarly),
    Bug("flush retried without replay", ("stable", "stale read"), NoReplay, LOSSES),
)
