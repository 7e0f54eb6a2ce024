# cython: annotation_typing=False
"""Turns of the data path: from /dev/fuse to the backend and back, without the event loop between.

A round through trio costs more than all that is done for a request. So while requests keep
coming, a turn reads, sends, receives and answers, and waits with an epoll of its own, for a
millisecond at the most. (It looks again and again at first, where what it last waited for came
soon: to sleep and be woken takes longer than that.) Then, or when its time is over, or when
something came that is for another task, trio goes on; an idle disk is trio's alone.
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
        self._polled: Polled | None = None
        self._fd = -1
        self._blocked = False
        self._misses = 0

    def run(self) -> bool:
        """One turn; False when the mount is gone."""
        channel, clock = self._channel, time.monotonic
        until = clock() + LONGEST
        while True:
            answered = channel.answered
            if not channel.drain():
                return False
            self._commit()
            if channel.others:
                return True
            # Who got an answer mostly has the next request at once.
            while channel.answered == answered:
                if clock() >= until or not (events := self._wait()):
                    return True
                if (channel.fuse, select.EPOLLIN) not in events or len(events) > 1:
                    self._poll()
                if (channel.fuse, select.EPOLLIN) in events:
                    break
            if clock() >= until:
                return True

    def _poll(self) -> None:
        if self._polled is not None and self._polled is self._backend.polled:
            try:
                self._polled.poll()
            except Exception:
                log.exception("internal error in the backend: the connection is given up")
                self._backend.close()
            self._commit()

    def _wait(self) -> list[tuple[int, int]]:
        """What is ready: (descriptor, events); nothing after a PAUSE."""
        polled = self._backend.polled
        if polled is not self._polled or (polled is not None and polled.blocked != self._blocked):
            self._watch(polled)
        poll, clock = self._epoll.poll, time.monotonic
        now = began = clock()
        events: list[tuple[int, int]] = []
        while self._misses < _MISSES and not events and now < began + _SPIN:
            events = poll(0)
            if not events:
                os.sched_yield()
            now = clock()
        events = events or poll(PAUSE)
        self._misses = 0 if clock() - began < 2 * _SPIN else self._misses + 1
        return events

    def _watch(self, polled: Polled | None) -> None:
        if self._fd >= 0:
            try:
                self._epoll.unregister(self._fd)
            except OSError:
                pass  # it was closed, and is gone from here with that
        self._polled, self._fd = polled, -1
        if polled is not None:
            self._fd, self._blocked = polled.ready_fd, polled.blocked
            self._epoll.register(
                self._fd, select.EPOLLIN | (select.EPOLLOUT if self._blocked else 0)
            )
