"""The worker's heartbeat: how the keeper knows that a worker hangs. Standard library only.

The worker's beats (daemon/beats.py) come from the loop that drives its engine; a loop that hangs
sends none. The keeper kills a worker that is silent for long, and its successor takes over: one
more outage. What systemd's watchdog would do instead is to kill the keeper, and the disk with it.

A disk that nobody uses is silent by right: nobody misses a worker that hangs then. The silence
counts from when somebody comes.

That it rests may be lost on the way to a keeper that was frozen. So in the middle of a silence the
worker is asked for a beat.

So the watchdog is fed with each beat, and while the keeper does all that can be done about a
worker: it was killed and has not ended, or another one is about to be started, or was and has not
beaten yet; and while the disk is idle. Not fed, it ends a keeper that hangs itself.
"""

from __future__ import annotations

import math

from healfs.daemon.sd_notify import SdNotify

BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # a worker that has not beaten for so long hangs
START_SECONDS = 60.0  # from its start to its first beat


class Heartbeat:
    def __init__(self, systemd: SdNotify) -> None:
        self._systemd = systemd
        watchdog = systemd.watchdog or math.inf
        self.period = min(BEAT_SECONDS, watchdog / 4)
        self._idle_patience = watchdog / 4
        self.limit = min(SILENT_SECONDS, watchdog / 2)
        self.silent = 0.0
        self._looked = self._fed = 0.0
        self._has_beaten = False
        self.is_idle = False
        self._was_killed = False
        self._was_asked = False

    @property
    def patience(self) -> float:
        """Seconds without a beat after which there may be something to see to."""
        return self._idle_patience if self.is_idle else self.period

    def started(self, now: float) -> None:
        """Another worker."""
        self._has_beaten = self.is_idle = self._was_killed = self._was_asked = False
        self.silent = 0.0
        self._looked = now
        self._feed(now)

    def beat(self, now: float, idle: bool = False) -> None:
        """`idle`: the next one comes when something else does."""
        self._has_beaten = True
        self._was_asked = False
        self.is_idle = idle
        self.silent = 0.0
        self._feed(now)

    def something_came(self, now: float) -> None:
        """To a disk that was idle: its worker has to beat."""
        self.is_idle = False
        self._looked = now

    def hangs(self, now: float) -> bool:
        """To be asked with each beat, and after `patience` without one. True once a worker: it
        has been silent for too long."""
        if self.is_idle:
            self.none_runs(now)
            return False
        # At most so much a look: while this process was frozen, so was the worker.
        self.silent += min(now - self._looked, 2 * self.period)
        self._looked = now
        if self._was_killed or not self._has_beaten:
            self.none_runs(now)
        limit = self.limit if self._has_beaten else START_SECONDS
        if self._was_killed or self.silent < limit:
            return False
        self._was_killed = True
        return True

    def has_to_ask(self) -> bool:
        """True once a silence, in its middle: the worker is to be asked for a beat."""
        if self._was_asked or self.silent < self.limit / 2:
            return False
        self._was_asked = True
        return True

    def none_runs(self, now: float) -> None:
        """To be said now and then: no worker has to beat; there is none, or it was killed."""
        self._looked = now
        if now - self._fed >= self.period:
            self._feed(now)

    def _feed(self, now: float) -> None:
        self._fed = now
        self._systemd.feed()
