"""Attempts whose fate is unknown (promise 4): no newer write goes to such a range.

An attempt was sent on a connection that is gone. It is settled when a fence succeeded after
that, or settle seconds later, or, still in the backend's hands, when it is answered (that case
never comes here: the engine keeps such a request in flight). The request itself may be sent
again at once, for it carries the same bytes; an older one may, for the newer follows it. (Not so
a piece of a replay where the attempt was of a part of a block and carries older bytes beside it.)
"""

from __future__ import annotations

from collections.abc import Iterator

from healfs.core.order import unblocked, wait
from healfs.core.overlap import Overlap
from healfs.core.request import Request
from healfs.core.writelog import Attempt, WriteLog


class Unsettled:
    def __init__(self, log: WriteLog) -> None:
        self._log = log
        self._ranges = Overlap()
        self._attempts: dict[int, Attempt] = {}  # by id; the oldest loss first
        self._of: dict[int, list[Attempt]] = {}  # by the request's order

    def __len__(self) -> int:
        return len(self._attempts)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self._attempts.values())

    def add(self, order: int, start: int, end: int, until: float, *, foreign: bool = False) -> None:
        """The connection is closed, or about to be; one entry a range that was sent.

        A replay sends an entry in pieces, around what is newer: a range over all of them would
        hold that back, and with it the replay. The same range once more takes the place of the
        first, whoever waits for that.
        """
        attempt = Attempt(start, end, order, until, foreign=foreign)
        for old in list(self._of.get(order, ())):
            if start <= old.start and old.end <= end:
                self._remove(old)
                attempt.foreign |= old.foreign
                if old.waiters:
                    attempt.waiters = (attempt.waiters or []) + old.waiters
        self.restore(attempt)
        self._log.note(attempt)

    def restore(self, attempt: Attempt) -> None:
        """One that an earlier worker has noted."""
        self._attempts[id(attempt)] = attempt
        self._of.setdefault(attempt.order, []).append(attempt)
        self._ranges.add(attempt)

    def _remove(self, attempt: Attempt) -> None:
        del self._attempts[id(attempt)]
        of = self._of[attempt.order]
        of.remove(attempt)
        if not of:
            del self._of[attempt.order]
        self._ranges.remove(attempt)
        self._log.forget(attempt)

    def holds_back(self, start: int, end: int, order: int) -> list[Attempt]:
        """The attempts that a write of `order` to this range has to wait for."""
        found = self._ranges.find(start, end)
        return [a for a in found if isinstance(a, Attempt) and a.order < order]

    def holds_back_piece(self, start: int, end: int, order: int, *, parts: bool) -> bool:
        """Whether a piece of a replay has to wait: its bytes may not be on the disk yet. `parts`:
        there are other bytes of its entry in the same blocks, which may be a piece of their own."""
        for attempt in self._ranges.find(start, end):
            assert isinstance(attempt, Attempt)
            if parts if attempt.order == order else attempt.foreign or attempt.order < order:
                return True
        return False

    def block(self, request: Request) -> bool:
        """Make a request wait for what holds it back; whether anything does."""
        found = self.holds_back(request.start, request.end, request.order)
        for attempt in found:
            wait(request, attempt)
        return bool(found)

    def let_go(self, request: Request) -> bool:
        """It was given up; whether it waited for attempts, and does so no more."""
        waited = False
        for attempt in self.holds_back(request.start, request.end, request.order):
            while attempt.waiters and request in attempt.waiters:
                attempt.waiters.remove(request)
                request.blockers -= 1
                waited = True
        return waited

    def next_time(self) -> float | None:
        return min((a.until for a in self._attempts.values()), default=None)

    def settle(self, now: float) -> list[Request]:
        """Settle those whose time is over; returns the requests that wait for nothing more."""
        over = [a for a in self._attempts.values() if a.until <= now]
        return self._settle(over)

    def settle_all(self, attempts: list[Attempt]) -> list[Request]:
        """The fence that was begun when these were all has succeeded."""
        return self._settle([a for a in attempts if id(a) in self._attempts])

    def _settle(self, attempts: list[Attempt]) -> list[Request]:
        free: list[Request] = []
        for attempt in attempts:
            self._remove(attempt)
            free += unblocked(attempt.waiters)
        return free
