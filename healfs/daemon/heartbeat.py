"""The worker's heartbeat: how the keeper knows that a worker hangs. Standard library only.

The worker's beats come from the loop that drives its engine; a loop that hangs sends none. The
keeper kills a worker that is silent for long, and its successor takes over: one more outage. What
systemd's watchdog would do instead is to kill the keeper, and the disk with it.

So the watchdog is fed with each beat, and while the keeper does all that can be done about a
worker: it was killed and has not ended, or another one is about to be started, or was and has not
beaten yet. Not fed, it ends a keeper that hangs itself.
"""

from __future__ import annotations

from healfs.daemon.sd_notify import SdNotify

BEAT_SECONDS = 1.0
IDLE_SECONDS = 6.0  # between the beats of a disk that nobody uses
SILENT_SECONDS = 30.0  # a worker that has not beaten for so long hangs
START_SECONDS = 60.0  # from its start to its first beat


class Heartbeat:
    def __init__(self, systemd: SdNotify) -> None:
        self._systemd = systemd
        watchdog = systemd.watchdog
        self.period = min(BEAT_SECONDS, watchdog / 4) if watchdog else BEAT_SECONDS
        self.idle_period = min(IDLE_SECONDS, watchdog / 4) if watchdog else IDLE_SECONDS
        self.limit = min(SILENT_SECONDS, watchdog / 2) if watchdog else SILENT_SECONDS
        self.silent = 0.0
        self._looked = self._fed = 0.0
        self._has_beaten = False
        self._is_idle = False
        self._was_killed = False

    @property
    def patience(self) -> float:
        """Seconds without a beat after which there may be something to see to."""
        return 2 * self.idle_period if self._is_idle else self.period

    def started(self, now: float) -> None:
        """Another worker."""
        self._has_beaten = self._is_idle = self._was_killed = False
        self.silent = 0.0
        self._looked = now
        self._feed(now)

    def beat(self, now: float, idle: bool = False) -> None:
        """`idle`: the next one may come after the idle period only."""
        self._has_beaten = True
        self._is_idle = idle
        self.silent = 0.0
        self._feed(now)

    def hangs(self, now: float) -> bool:
        """To be asked with each beat, and after `patience` without one. True once a worker: it
        has been silent for too long."""
        # At most so much a look: while this process was frozen, so was the worker.
        self.silent += min(now - self._looked, max(self.patience, 2 * self.period))
        self._looked = now
        if self._was_killed or not self._has_beaten:
            self.none_runs(now)
        limit = self.limit if self._has_beaten else START_SECONDS
        if self._was_killed or self.silent < limit:
            return False
        self._was_killed = True
        return True

    def none_runs(self, now: float) -> None:
        """To be said now and then: there is no worker, or one that was killed and cannot end."""
        self._looked = now
        if now - self._fed >= self.period:
            self._feed(now)

    def _feed(self, now: float) -> None:
        self._fed = now
        self._systemd.feed()
