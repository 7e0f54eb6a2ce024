# cython: annotation_typing=False
"""Who waits for whom: a write for older overlapping writes, a read for the same, nobody else.

What counts is the range in whole minimum blocks (request.start, request.end), since a write of
part of a block is a read, modify, write of all of it.
"""

from __future__ import annotations

from typing import Protocol

from healfs.core.overlap import Overlap
from healfs.core.request import Kind, Request

READ = Kind.READ


class Order:
    def __init__(self) -> None:
        self._writes = Overlap()

    def __len__(self) -> int:
        """Writes outstanding (those hidden behind a newer one that covers them not counted)."""
        return len(self._writes)

    def enter(self, request: Request) -> None:
        """Sets request.blockers: how many older writes it has to wait for."""
        is_write = request.kind is not READ
        if is_write and self._writes.add_alone(request):
            request.indexed = True
            return
        for older in self._writes.find(request.start, request.end):
            assert isinstance(older, Request)
            wait(request, older)
            # Whoever comes next waits for this write, and so for the older one that it covers:
            # a thousand writes to one block cost a thousand steps, not a million.
            if is_write and request.start <= older.start and older.end <= request.end:
                self._writes.remove(older)
                older.indexed = False
        if is_write:
            self._writes.add(request)
            request.indexed = True

    def leave(self, request: Request) -> list[Request]:
        """It is out of the backend's hands; returns those that have no blocker any more."""
        if request.indexed:
            self._writes.remove(request)
            request.indexed = False
        waiters = request.waiters
        if waiters is None:
            return []
        request.waiters = None
        return unblocked(waiters)


class Blocker(Protocol):
    """A request, or an unsettled attempt."""

    waiters: list[Request] | None


def wait(request: Request, older: Blocker) -> None:
    """`request` waits for `older`, too."""
    if older.waiters is None:
        older.waiters = [request]
    else:
        older.waiters.append(request)
    request.blockers += 1


def unblocked(waiters: list[Request] | None) -> list[Request]:
    """Take one blocker from each; returns those that have none left."""
    free = []
    for waiter in waiters or ():
        waiter.blockers -= 1
        if not waiter.blockers:
            free.append(waiter)
    return free
