"""The outage's clock: from the first loss until a guest's request is answered again."""

from __future__ import annotations

import errno as e
from typing import Any

# What kind of outage it is; it may change while it lasts.
AWAY = "away"  # the connection is lost, and the tries to come back fail
SILENT = "silent"  # connected, and nothing is answered
MISMATCH = "mismatch"  # what came back is another disk
WORKER = "worker"  # the worker died; whether the backend is there its successor will know

AT_ONCE = 0.001  # seconds: no wait


class Outage:
    """Before the first connection the clock runs, too, but that is no outage to be counted."""

    def __init__(self, now: float) -> None:
        self.since: float | None = now
        self.errno = e.ETIMEDOUT
        self.kind = ""
        self.count = 0
        self.longest = 0.0
        self.oldest: float | None = None  # arrival of the first request that waited
        self._answered = 0  # requests, when it began
        self._at_once = 0  # of those answered since, that waited for nothing
        self._longest_wait = 0.0
        self._inherited: float | None = None  # `oldest`, of the worker before

    def begin(self, since: float, errno: int, answered: int) -> bool:
        """Whether this is a new outage, not one more loss in the same. `answered`: requests."""
        self.errno = errno
        if self.since is not None:
            return False
        self.since = since
        self.count += 1
        self.oldest = self._inherited = None
        self._answered, self._at_once, self._longest_wait = answered, 0, 0.0
        return True

    def change(self, kind: str) -> bool:
        """Whether it is of another kind now."""
        changed = self.since is not None and self.count > 0 and kind != self.kind
        if changed:
            self.kind = kind
        return changed

    def waited(self, seconds: float) -> None:
        """A request has waited so long."""
        self._longest_wait = max(self._longest_wait, seconds)

    def gave_up(self, seconds: float) -> None:
        """A request is answered as the policy says, after such a wait."""
        self._at_once += seconds < AT_ONCE
        self.waited(seconds)

    def end(self, now: float, answered: int) -> dict[str, object] | None:
        """What there is to tell of it; None if there was none.

        `answered`: requests, those that still wait among them.
        """
        since, self.since = self.since, None
        if since is None or not self.count:
            return None
        self.longest = max(self.longest, now - since)
        if self._inherited is not None:
            self.waited(now - self._inherited)
        return {
            "seconds": round(now - since, 3),
            "requests_waited": answered - self._answered - self._at_once,
            "longest_wait": round(self._longest_wait, 3),
        }

    def age(self, now: float) -> float:
        return 0.0 if self.since is None else now - self.since

    def as_dict(self, now: float) -> dict[str, object]:
        current = self.age(now) if self.count else 0.0
        return {
            "count": self.count,
            "current_seconds": round(current, 3),
            "longest_seconds": round(max(self.longest, current), 3),
        }

    def save(self) -> dict[str, object]:
        """For a successor on the same host, whose monotonic clock is the same."""
        return {
            "since": self.since,
            "errno": self.errno,
            "kind": self.kind,
            "count": self.count,
            "longest": self.longest,
            "oldest": self.oldest,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Its requests come again and are counted again, but cannot say when they came first."""
        self.since, self.errno = saved["since"], saved["errno"]
        self.kind = saved.get("kind", AWAY)
        if self.since is not None:
            self.oldest = self._inherited = saved.get("oldest")
        self.count, self.longest = saved["count"], saved["longest"]
