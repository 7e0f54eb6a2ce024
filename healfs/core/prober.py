"""When to try to reach the backend again: one prober, with backoff.

The first try is immediate; then the pause doubles with jitter from FIRST_PAUSE up to the
policy's retry-interval. A backend that dies soon after each return waits its turn: the backoff
starts over only after a retry-interval of health.
"""

from __future__ import annotations

import random

FIRST_PAUSE = 0.01  # seconds
HINT_PAUSE = 0.0005  # half the first pause after a hint: a socket is bound before it listens


class Prober:
    """Times are those of the engine's clock, in seconds."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._pause = 0.0
        self._up_since = 0.0
        self.trying = False
        self.next_try: float | None = None

    def up(self, now: float) -> None:
        self._up_since = now
        self.trying = False
        self.next_try = None

    def down(self, now: float, longest: float) -> None:
        """The connection is lost: sets next_try, `now` if it was healthy before."""
        if now - self._up_since >= longest:
            self._pause = 0.0
            self.next_try = now
        else:
            self.failed(now, longest)

    def failed(self, now: float, longest: float) -> None:
        """A try did not succeed: sets next_try."""
        self.trying = False
        self._pause = min(longest, self._pause * 2 or FIRST_PAUSE)
        self.next_try = now + self._pause * self._rng.uniform(0.75, 1.0)

    def later(self, when: float) -> None:
        """The wrong disk is there: look again at `when`."""
        self.trying = False
        self.next_try = when

    def at_most(self, when: float) -> None:
        """retry-interval became shorter."""
        if self.next_try is not None:
            self.next_try = min(self.next_try, when)

    def hint(self) -> bool:
        """Something changed outside; is a try now worth it?"""
        if self.next_try is None:
            return False
        self._pause = HINT_PAUSE
        return True

    def begin(self) -> None:
        self.next_try = None
        self.trying = True
