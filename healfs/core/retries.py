"""Requests that failed and are to be tried again, each with its own backoff.

One rate limit holds for all together: a backend on which everything fails is not hammered.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator

from healfs.core.policy import DirectionPolicy
from healfs.core.prober import FIRST_PAUSE
from healfs.core.request import Request


class Retries:
    def __init__(self, rng: random.Random, per_second: int) -> None:
        self._rng = rng
        self._gap = 1 / per_second
        self._last = 0.0
        self._failing: dict[int, Request] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._failing)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._failing.values())

    def add(self, request: Request, policy: DirectionPolicy, now: float) -> float:
        """Schedule the next try; returns when."""
        pause = min(
            policy.retry_interval, FIRST_PAUSE * (1 << min(max(request.attempts - 1, 0), 30))
        )
        pause *= self._rng.uniform(0.75, 1.0)
        when = self._last = max(now + pause, self._last + self._gap)
        # Not later than its time is up: then the policy is asked, and nothing is sent.
        when = max(now, min(when, policy.ends(request.first_error)))
        request.retry_at = when
        self._failing[request.order] = request
        heapq.heappush(self._heap, (when, request.order))
        return when

    def discard(self, request: Request) -> None:
        self._failing.pop(request.order, None)

    def take_all(self, now: float) -> list[Request]:
        """All of them, oldest first; the rate starts anew."""
        taken = [self._failing[order] for order in sorted(self._failing)]
        self._failing, self._heap, self._last = {}, [], now
        return taken

    def due(self, now: float) -> Request | None:
        """Take the next one whose time has come."""
        while self._heap and self._heap[0][0] <= now:
            when, order = heapq.heappop(self._heap)
            request = self._failing.get(order)
            if request is not None and request.retry_at == when:  # else answered meanwhile
                return self._failing.pop(order)
        return None

    def next_time(self) -> float | None:
        return self._heap[0][0] if self._heap else None
