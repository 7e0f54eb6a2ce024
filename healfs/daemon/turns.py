# cython: annotation_typing=False
"""Turns of the data path: from /dev/fuse to the backend and back, without the event loop between.

A round through trio costs more than all that is done for a request. So while requests keep
coming, a turn reads, sends, receives and answers, and looks again: to sleep and be woken takes
longer than what it waits for, mostly. Where that does not come soon it sleeps, in an epoll of its
own and for a millisecond at the most. Then, or when its time is over, or when something came that
is for another task, trio goes on; an idle disk is trio's alone.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable

from healfs.backends.base import Backend, Polled
from healfs.fuse.channel import Channel

log = logging.getLogger("healfs.turns")

LONGEST = 0.005  # seconds of a turn: so long timers, control and namespace may have to wait
PAUSE = 0.001  # seconds without anything to do that end a turn
SPIN = 50e-6  # seconds: to be woken may take as long again, on a virtual machine longer
MISSES = 3  # waits in a row that were longer by far: it spins no more, until one is short
_SPIN, _MISSES = SPIN, MISSES


class Turns:
    def __init__(self, channel: Channel, backend: Backend, commit: Callable[[], None]) -> None:
        self._channel = channel
        self._backend = backend
        self._commit = commit
        self._epoll = select.epoll()
        self._epoll.register(channel.fuse, select.EPOLLIN)
        self._watched: Polled | None = None  # is in the epoll
        self._fd = -1
        self._blocked = False
        self._attended: Polled | None = None
        self._misses = 0

    def run(self) -> bool:
        """One turn; False when the mount is gone."""
        try:
            return self._run()
        finally:
            self._attend(None)

    def _run(self) -> bool:
        channel, clock = self._channel, time.monotonic
        last = clock()  # when something came, the last time
        until = last + LONGEST
        waited = False
        while True:
            received, answered = channel.received, channel.answered
            if not channel.drain():
                return False
            if channel.received != received:
                self._commit()
            if channel.others:
                return True
            self._poll()
            now = clock()
            if now >= until:
                return True
            if channel.received != received or channel.answered != answered:
                if waited:
                    self._misses = 0 if now < last + 2 * _SPIN else self._misses + 1
                    waited = False
                last = now
                continue
            waited = True
            if self._misses < _MISSES and now < last + _SPIN:
                os.sched_yield()
            elif not self._sleep():
                self._misses += 1
                return True

    def _poll(self) -> None:
        polled = self._backend.polled
        self._attend(polled)
        if polled is not None:
            try:
                if not polled.poll():
                    return
            except Exception:
                log.exception("internal error in the backend: the connection is given up")
                self._backend.close()
            self._commit()

    def _attend(self, polled: Polled | None) -> None:
        """`polled` is looked at again and again from now on, nobody else is."""
        if polled is not self._attended:
            if self._attended is not None:
                self._attended.attend(False)
            self._attended = polled
            if polled is not None:
                polled.attend(True)

    def _sleep(self) -> bool:
        """Until something is ready; False: nothing was in a PAUSE."""
        polled = self._backend.polled
        if polled is not self._watched or (polled is not None and polled.blocked != self._blocked):
            self._watch(polled)
        self._attend(None)
        return bool(self._epoll.poll(PAUSE))

    def _watch(self, polled: Polled | None) -> None:
        if self._fd >= 0:
            try:
                self._epoll.unregister(self._fd)
            except OSError:
                pass  # it was closed, and is gone from here with that
        self._watched, self._fd = polled, -1
        if polled is not None:
            self._fd, self._blocked = polled.ready_fd, polled.blocked
            self._epoll.register(
                self._fd, select.EPOLLIN | (select.EPOLLOUT if self._blocked else 0)
            )
