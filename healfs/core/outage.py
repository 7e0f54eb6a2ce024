"""The outage's clock: from the first loss until a guest's request is answered again."""

from __future__ import annotations

import errno as e
from typing import Any


class Outage:
    """Before the first connection the clock runs, too, but that is no outage to be counted."""

    def __init__(self, now: float) -> None:
        self.since: float | None = now
        self.errno = e.ETIMEDOUT
        self.waited = 0  # requests
        self.count = 0
        self.longest = 0.0

    def begin(self, since: float, errno: int) -> bool:
        """Whether this is a new outage, not one more loss in the same."""
        self.errno = errno
        if self.since is not None:
            return False
        self.since = since
        self.waited = 0
        self.count += 1
        return True

    def end(self, now: float) -> float | None:
        """Its length in seconds; None if there was none."""
        since, self.since = self.since, None
        if since is None or not self.count:
            return None
        self.longest = max(self.longest, now - since)
        return now - since

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
            "waited": self.waited,
            "count": self.count,
            "longest": self.longest,
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.since, self.errno = saved["since"], saved["errno"]
        self.waited, self.count, self.longest = saved["waited"], saved["count"], saved["longest"]
