"""Looks at an opened file, in threads: each may wait for the storage, and may never come back."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from healfs.backends.base import Extent
from healfs.backends.opening import close_all

MAXIMUM_EXTENTS = 1024  # runs in one answer of extents()
THREADS = 2

T = TypeVar("T")


class Looks:
    """`left` takes a descriptor that a thread has to close: close(2) may wait, too."""

    def __init__(self, left: Callable[[int], None]) -> None:
        self._left = left
        self._limiter = trio.CapacityLimiter(THREADS)

    async def look(self, fd: int, function: Callable[[int], T]) -> T:
        """Call function(fd) with a descriptor of its own: the session's may be closed before the
        thread is done. It should have no locks: they would stay as long as the look hangs.
        OSError: there is none to be had, or the function's."""
        borrowed = _Borrowed(os.dup(fd))
        try:
            return await trio.to_thread.run_sync(
                borrowed.use, function, abandon_on_cancel=True, limiter=self._limiter
            )
        finally:
            if borrowed.give_up():
                self._left(borrowed.fd)


class _Borrowed:
    """A duplicate of a descriptor for one call in a thread, which may never get to run."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._taken = threading.Lock()  # by the thread, which closes it

    def use(self, function: Callable[[int], T]) -> T:
        if not self._taken.acquire(blocking=False):
            raise OSError(errno.ECANCELED, "nobody waits for it any more")
        try:
            return function(self.fd)
        finally:
            close_all([self.fd])

    def give_up(self) -> bool:
        """True: the thread has not begun, and never will."""
        return self._taken.acquire(blocking=False)


def extents(fd: int, offset: int, length: int) -> list[Extent] | None:
    """SEEK_DATA and SEEK_HOLE of the range. They move the file offset, which nobody uses."""
    runs: list[Extent] = []
    end = offset + length
    try:
        while offset < end and len(runs) < MAXIMUM_EXTENTS:
            try:
                data = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # else: a hole up to the end
                    return None
                data = end
            if data > offset:
                runs.append(Extent(offset, min(data, end) - offset, True))
            else:
                hole = min(os.lseek(fd, offset, os.SEEK_HOLE), end)
                runs.append(Extent(offset, hole - offset, False))
            offset += runs[-1].length
    except OSError:
        return None
    return runs
