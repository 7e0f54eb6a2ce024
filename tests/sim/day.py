"""A day of outages, in virtual time: every hour the same, so that what grows is a leak.

Nothing is remembered here of what is over: the oracle's part is in world.py.
"""

from __future__ import annotations

import errno as e
import gc
import heapq
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

from healfs.core.engine import Engine
from healfs.core.policy import Action, DirectionPolicy, Policy
from healfs.core.request import Done, Kind, Request
from healfs.core.writelog import WriteLog, memory_size

HOUR = 3600.0
SIZE, BLOCK, RING = 1 << 30, 4096, 4 << 20
OUTAGES = 60  # an hour
BURST = 50  # requests just before each begins, and just after
PATIENT = Policy()
HASTY = Policy(DirectionPolicy(Action.RETRY, 0.5, 3.0), DirectionPolicy(Action.RETRY, 0.5, 3.0))
KINDS = (Kind.WRITE,) * 6 + (Kind.READ,) * 4 + (Kind.FLUSH, Kind.WRITE_ZEROES, Kind.DISCARD)
FAULTS = ("crash", "away", "silent", "mismatch", "reconnect", "errors", "fail", "policy", "pause")


class Day:
    """The engine, a backend that does nothing but answer, guests, and an operator."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = self._alarm = self._session = 0
        self._away_until = self._silent_until = self._other_until = self._bad_until = 0.0
        self.waiting: set[int] = set()
        self.answered = self.outages = 0
        log = WriteLog(memoryview(bytearray(memory_size(RING, 4096))), 4096, RING // 4)
        more: dict[str, Any] = {"settle": 5.0, "rng": random.Random(1)}
        self.engine = Engine(self, PATIENT, lambda: self.now, log, **more)
        self.engine.size = SIZE
        self.engine.start()

    # --- time -------------------------------------------------------------------------------

    def _later(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay, self._sequence, call, arguments))

    def _until(self, end: float) -> None:
        while self._heap and self._heap[0][0] <= end:
            self.now, _, call, arguments = heapq.heappop(self._heap)
            call(*arguments)
        self.now = end

    def hour(self) -> int:
        """Bytes in use at its end, when nothing waits and all is flushed."""
        rng, start = random.Random(7), self.now
        for second in range(int(HOUR) - 120):
            self._later(second + rng.random(), self._submit, rng)
        for number in range(OUTAGES):
            at = number * (HOUR - 120) / OUTAGES
            self._later(at, self._fault, FAULTS[number % len(FAULTS)], rng)
        self._until(start + HOUR - 60)
        assert not self.waiting, f"{len(self.waiting)} requests were never answered"
        self._request(Kind.FLUSH, 0)
        self._until(start + HOUR)
        assert not self.waiting and not len(self.engine.log) and not self.engine.log.ring.used
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    # --- the guests and the operator --------------------------------------------------------

    def _submit(self, rng: random.Random) -> None:
        request = self._request(rng.choice(KINDS), rng.randrange(256))
        if rng.random() < 0.05:
            self._later(rng.random(), self.engine.cancel, request)

    def _request(self, kind: Kind, block: int) -> Request:
        self._sequence += 1
        length = 0 if kind is Kind.FLUSH else BLOCK
        offset = 0 if kind is Kind.FLUSH else block * BLOCK
        request = Request(kind, offset, length, self._answered, tag=self._sequence)
        if kind is Kind.WRITE:
            ring = self.engine.log.ring
            ring.target()
            request.owner = slot = ring.keep(BLOCK)
            request.data, slot.request = slot.data, request
            request.fua = block % 8 == 0
        self.waiting.add(request.tag)
        self.engine.submit(request)
        return request

    def _answered(self, request: Request, errno: int, data: object) -> None:
        self.waiting.remove(request.tag)
        self.answered += 1

    def _burst(self, rng: random.Random) -> None:
        for _ in range(BURST):
            self._submit(rng)

    def _fault(self, name: str, rng: random.Random) -> None:
        self.outages += 1
        self._burst(rng)
        until = self.now + rng.uniform(1, 20)
        match name:
            case "silent":
                self._silent_until = until
            case "errors":
                self._bad_until = until
            case "reconnect":
                self.engine.reconnect()
            case "fail":
                self._away_until = until
                self.engine.lost(e.ECONNRESET)
                self._later(1.0, self.engine.fail_all)
            case "policy":
                self._away_until = until
                self.engine.lost(e.ECONNRESET)
                self.engine.set_policy(HASTY)
                self._later(20.0, self.engine.set_policy, PATIENT)
            case "pause":
                self.engine.pause()
                self._later(5.0, self.engine.resume)
            case _:
                self._away_until = until if name == "away" else 0.0
                self._other_until = until if name == "mismatch" else 0.0
                self.engine.lost(e.ECONNRESET)
        self._burst(rng)

    # --- Effects ----------------------------------------------------------------------------

    def send(self, request: Request, done: Done) -> None:
        delay = max(0.001, self._silent_until - self.now)
        self._later(delay, self._reply, self._session, request)

    def _reply(self, session: int, request: Request) -> None:
        if session != self._session:
            return
        data = bytes(request.length) if request.kind is Kind.READ else None
        bad = self.now < self._bad_until and request.offset % (4 * BLOCK) == 0
        self.engine.completed(request, e.EIO if bad else 0, data)

    def taken(self, request: Request) -> bool:
        return True

    def heard(self) -> float:
        return 0.0

    def connect(self) -> None:
        self._later(0.01, self._try)

    def _try(self) -> None:
        if self.now < self._away_until:
            self.engine.connect_failed(e.ECONNREFUSED)
        else:
            mismatch = "another disk" if self.now < self._other_until else ""
            self.engine.connected(SIZE, mismatch=mismatch)

    def close(self) -> None:
        self._session += 1

    def wake_at(self, when: float) -> None:
        self._alarm += 1
        self._later(max(when - self.now, 1e-6), self._wake, self._alarm)

    def _wake(self, alarm: int) -> None:
        if alarm == self._alarm:
            self.engine.wake()

    def event(self, name: str, data: dict[str, object]) -> None:
        pass

    def probe(self) -> None:
        self._later(0.01, self.engine.probed, "")

    def fence(self) -> None:
        self._later(0.01, self.engine.fenced)
