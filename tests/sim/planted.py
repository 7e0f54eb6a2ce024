"""Bugs planted on purpose: each must be found within a bounded number of seeds.

A bug is a subclass of the engine, or a changed function, and the options under which it shows.
They go through the public interface where they can, so that they outlive changes inside.
"""

from __future__ import annotations

import errno as e
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from healfs.core import replay
from healfs.core import request as requests
from healfs.core.engine import Engine
from healfs.core.overlap import Overlap
from healfs.core.request import TAG_MASK, Kind, Phase, Request
from healfs.core.ring import PayloadRing
from healfs.core.states import State
from healfs.core.unsettled import Unsettled
from healfs.core.writelog import WriteLog
from tests.sim.plan import TODAY, WITH_LOG, Options, Plan
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
    """A completion that comes for a second attempt at a read is taken for an old one."""

    def completed(self, request: Request, errno: int, data: object = None) -> None:
        if request.kind is not Kind.READ or request.attempts < 2:
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
            self.log.release(request)


class NoReplay(Engine):
    """A flush is retried after a reconnect, and nothing was written again: what QEMU's NBD
    client with reconnect-delay and nbdkit's retry filter do."""

    def connected(self, size: int, **keywords: Any) -> None:
        super().connected(size, **(keywords | {"volatile_cache": False}))


class LatchCleared(Engine):
    """A flush that failed is tried again, alone."""

    def _flush_failed(self, errno: int, guests: Iterable[Request]) -> None:
        for request in guests:
            self._judge_failed(request, errno, self.clock())


class StaysLatched(Engine):
    """A flush that failed in a silence is replayed with the next connection only."""

    def _answered_again(self, request: Request, replaying: bool) -> None:
        begin, self._begin_replay = self._begin_replay, lambda: None  # type: ignore[method-assign]
        super()._answered_again(request, replaying)
        self._begin_replay = begin  # type: ignore[method-assign]


class FlushDoesNotWaitForFua(Engine):
    """A flush is believed although what goes on beside it may have been told of its error."""

    def _flushed(self, flush: Request, errno: int) -> None:
        self._flush_ended(flush, errno)


class ReplaysInAPause(Engine):
    def _stop_replay(self) -> None:
        if self.link_up:
            self._pump_replay()
        else:
            super()._stop_replay()

    def _pump_replay(self) -> None:
        state = self.state
        if state is State.PAUSED and self._replay.running:
            self.state = State.REPLAYING
        super()._pump_replay()
        if state is State.PAUSED and self.state is State.REPLAYING:
            self.state = state

    def _send_internal(self, request: Request, now: float) -> None:
        state = self.state
        if self.paused_by:
            self.state = State.PAUSED
        super()._send_internal(request, now)
        self.state = state


class UnsettledLostWithTheWorker(Engine):
    def take_over(self) -> None:
        recover = self.log.recover
        self.log.recover = lambda on_answer: (recover(on_answer)[0], [])  # type: ignore[method-assign]
        super().take_over()
        self._unsettled = Unsettled(self.log)


class ResentAnsweredUnsent(Engine):
    """What comes again from the kernel and is in the log already is answered at once."""

    def _submit_again(self, request: Request) -> bool:
        if (entry := self._recovered.get(request.tag & TAG_MASK)) is not None:
            entry.completed = 1
        return super()._submit_again(request)


class ResentWithItsNewBytes(Engine):
    """What comes again is sent with the bytes that it has now."""

    def _submit_again(self, request: Request) -> bool:
        data = None if request.data is None else bytes(request.data)
        done = super()._submit_again(request)
        if data is not None and request.data is not None:
            memoryview(request.data)[:] = data
        return done


def fua_not_logged(log: WriteLog, request: Request, hold: Any = None) -> None:
    if request.fua:
        log._count += 1
        request.completed = log._count
        log.leave(request)
    else:
        _COMPLETE(log, request, hold)


def trims_by_answer_time(log: WriteLog, mark: int, hold: Any = None) -> None:
    _TRIM(log, log.mark(), hold)


def frees_as_it_finds(
    log: WriteLog, entries: Iterable[Request], hold: Any = None, mark: int = 0
) -> None:
    """What has completed since, then what was replayed, then what was held."""
    log.trim(mark, hold)
    for request in entries:
        _REPLAYED(log, [request], hold or _nothing)
    if hold is None:
        _REPLAYED(log, [])


def _nothing(request: Request) -> bool:
    return False


def newest_first(entries: Iterable[Request]) -> Iterator[tuple[Request, int, int]]:
    for entry in reversed(list(entries)):
        yield entry, entry.offset, entry.offset + entry.length


class AcceptDropsTheLog(Engine):
    def accept(self, *, replay: bool) -> None:
        super().accept(replay=False)


_COMPLETE, _TRIM, _REPLAYED = WriteLog.complete, WriteLog.trim, WriteLog.replayed
LOSSES = replace(TODAY, cache_loss=True)
SILENCES = Options(flush_loses=True).only({"freeze", "flush_loses", "delay"})
BESIDE = Options(flush_loses=True, fua_fails=True).only({"delay", "flush_loses", "fua_fails"})
PAUSES = WITH_LOG.only({"pause", "disconnect", "cache_loss"})
READS_ON = WITH_LOG.only({"reads_on", "worker"})
CRASHES = replace(TODAY, late=True, worker=True)
KILLS = WITH_LOG.only({"refused_entry", "killed"})
CHANGES = WITH_LOG.only({"worker", "killed", "late", "torn"})


def _patched(target: object, name: str, new: object) -> Callable[[], Any]:
    return lambda: mock.patch.object(target, name, new)


LIES = ("stale read", "stable")

BUGS = (
    Bug(
        "overlap ignored",
        ("stale read", "stable"),
        patch=_patched(Overlap, "find", lambda self, start, end: []),
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
    Bug("flush retried without replay", LIES, NoReplay, LOSSES),
    Bug(
        "FUA not logged", LIES, options=LOSSES, patch=_patched(WriteLog, "complete", fua_not_logged)
    ),
    Bug(
        "flush trims by answer time",
        LIES,
        options=replace(LOSSES, session_flush=True),
        patch=_patched(WriteLog, "trim", trims_by_answer_time),
    ),
    Bug(
        "replay out of order",
        LIES,
        options=LOSSES,
        patch=_patched(replay, "visible", newest_first),
    ),
    Bug(
        "late old write over newer",
        LIES,
        options=replace(TODAY, late=True),
        keywords={"settle": 0.0},
    ),
    Bug("accept drops the log", LIES, AcceptDropsTheLog, replace(LOSSES, accept=True)),
    Bug("latch cleared after a failed flush", LIES, LatchCleared, replace(TODAY, flush_loses=True)),
    Bug("latched after a silence", ("lost answer",), StaysLatched, SILENCES),
    Bug("flush beside a FUA write", LIES, FlushDoesNotWaitForFua, BESIDE),
    Bug("a replay goes on in a pause", ("sent in a pause",), ReplaysInAPause, PAUSES),
    Bug(
        "ring with room where the last worker's attempts read",
        ("garbage", *LIES),
        options=READS_ON,
        patch=_patched(PayloadRing, "shut", lambda self: None),
    ),
    Bug("unsettled set lost with the worker", LIES, UnsettledLostWithTheWorker, CRASHES),
    Bug("resent bytes answered, not sent", LIES, ResentAnsweredUnsent, CRASHES),
    Bug("resent bytes sent, not the saved ones", ("changed",), ResentWithItsNewBytes, CHANGES),
    Bug(
        "resent unsorted",
        LIES,
        options=CRASHES,
        patch=_patched(requests, "_first_tag", lambda request: 0),
    ),
    Bug(
        "freed as it is found",
        LIES,
        options=KILLS,
        patch=_patched(WriteLog, "replayed", frees_as_it_finds),
    ),
    Bug(
        "suspect bytes read from the backend",
        LIES,
        options=WITH_LOG,
        patch=_patched(replay.Suspects, "overlay", lambda self, start, end: []),
    ),
)
