"""The dumbest client that keeps every promise: one request at a time, all waits waited out.

It shows that the oracle is fair: whatever the simulated backend does, this passes. Each write is
followed by a flush before it is answered; when anything goes wrong, both are done again; after a
connection it waits the settle time. It ignores the policy and retries for ever.
"""

from __future__ import annotations

import errno as e
from collections import deque
from collections.abc import Callable
from typing import Any

from healfs.core.engine import Effects
from healfs.core.errors import ErrorClass, classify
from healfs.core.policy import Policy
from healfs.core.request import Kind, Request
from healfs.core.states import State
from healfs.core.writelog import WriteLog

PAUSE = 0.01
CHANGES = (Kind.WRITE, Kind.WRITE_ZEROES, Kind.DISCARD)


class Reference:
    def __init__(
        self,
        effects: Effects,
        policy: Policy,
        clock: Callable[[], float],
        log: WriteLog,
        *,
        settle: float = 5.0,
        **_: Any,
    ) -> None:
        self.effects = effects
        self.log = log  # only for the payloads
        self.clock = clock
        self.settle = settle
        self.slow_after = 0.0  # it waits for ever
        self.state = State.READY
        self.reason = ""
        self.size = 0
        self._queue: deque[Request] = deque()
        self._flush: Request | None = None  # behind the first of the queue
        self._sent = self._up = False
        self._not_before = 0.0

    def start(self) -> None:
        self.effects.connect()

    def submit(self, request: Request) -> None:
        if request.end > self.size:
            request.on_answer(request, e.EINVAL, None)
            self.log.release(request)
        else:
            self._queue.append(request)
            self._go()

    def _go(self) -> None:
        if self._sent or not self._up or not self._queue or self.clock() < self._not_before:
            return
        self._sent = True
        self.effects.send(self._flush or self._queue[0], self.completed)

    def completed(self, request: Request, errno: int, data: Any = None) -> None:
        self._sent = False
        first = self._queue[0]
        if errno and classify(errno) is ErrorClass.LOST:
            self.lost(errno)
        elif errno and classify(errno) is ErrorClass.FAILED:
            self._flush = None  # a failed flush: the write once more, too
            self._later(PAUSE)
        elif request is first and request.kind in CHANGES and not errno:
            self._flush = Request(Kind.FLUSH, 0, 0, lambda *_: None)
            self._flush.internal = True
        else:
            self._flush = None
            self._queue.popleft()
            if not first.answered:
                first.answered = True
                first.on_answer(first, errno, data if first.kind is Kind.READ else None)
            self.log.release(first)
        self._go()

    def cancel(self, request: Request, errno: int = e.EINTR) -> None:
        """It is done all the same; only its answer is out already."""
        request.answered = True
        request.on_answer(request, errno, None)

    def lost(self, errno: int) -> None:
        self._up = self._sent = False
        self._flush = None
        self.effects.close()
        self.effects.connect()

    def connected(self, size: int, *, mismatch: str = "", **_: Any) -> None:
        if mismatch:
            self.effects.close()
            self.effects.connect()
            return
        self._up = True
        self._later(self.settle)

    def _later(self, delay: float) -> None:
        self._not_before = self.clock() + delay
        self.effects.wake_at(self._not_before)

    def wake(self) -> None:
        self._go()

    def connect_failed(self, errno: int) -> None:
        self.effects.connect()

    def reconnect(self) -> None:
        if self._up:
            self.lost(e.ETIMEDOUT)

    def set_policy(self, policy: Policy) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
