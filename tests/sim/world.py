"""The world around the engine: a virtual clock, guests, the operator, and Effects."""

from __future__ import annotations

import errno as e
import heapq
import inspect
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from healfs.core.engine import Engine
from healfs.core.policy import Action, DirectionPolicy, Policy
from healfs.core.request import Kind, Request
from healfs.core.states import State
from tests.sim.disk import REFUSED, Server
from tests.sim.oracle import POISON, Oracle, Violation, decode, encode, value_of
from tests.sim.plan import SECTOR, Fault, Op, Plan

HEALED_WITHIN = 60.0  # virtual seconds until every request must be answered
MAX_EVENTS = 400_000

_POLICIES = (
    Policy(),
    Policy(DirectionPolicy(Action.REPORT), DirectionPolicy(Action.REPORT)),
    Policy(DirectionPolicy(), DirectionPolicy(Action.RETRY, 0.2, 1.0)),
    Policy(DirectionPolicy(Action.RETRY, 0.5, 2.0, Action.STOP), DirectionPolicy(Action.ENOSPC)),
    Policy(DirectionPolicy(Action.IGNORE), DirectionPolicy(Action.RETRY, 1.0, 3.0, Action.IGNORE)),
    Policy(DirectionPolicy(), DirectionPolicy(Action.STOP)),
)


class World:
    """One run of one plan. `run` raises Violation."""

    def __init__(
        self, plan: Plan, engine: type[Engine] = Engine, trace: list[str] | None = None, **more: Any
    ) -> None:
        self.plan = plan
        self.now = 1000.0
        self._start = self.now
        self.trace = trace
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self.events = 0
        self.server = Server(plan, self)
        self.oracle = Oracle(plan.sectors, lambda sector: self.server.disk.stable[sector])
        if "settle" in inspect.signature(engine.__init__).parameters:
            more.setdefault("settle", plan.settle)
        self.engine = engine(
            self, Policy(), lambda: self.now, rng=random.Random(plan.seed), **more
        )
        parameters = inspect.signature(engine.connected).parameters
        self._geometry = {"volatile_cache": True} if "volatile_cache" in parameters else {}
        self._queues: dict[int, deque[Op]] = {}
        self._outstanding: dict[int, int] = {}
        self._requests: dict[int, Request] = {}
        self._released: set[int] = set()
        self._linked = False  # as the engine was told, and told us
        self._completing: Request | None = None
        self._refused: set[int] = set()
        self._cancelled: set[int] = set()
        # The policies since a request came: any may have decided what it is answered.
        self._may_fail = {"read": False, "write": False}
        self._may_ignore = {"read": False, "write": False}

    # --- time ------------------------------------------------------------------------------

    def later(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay, self._sequence, call, arguments))

    def say(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now - self._start:11.6f}  {text}")

    def run(self) -> None:
        for entry in self.plan.entries:
            if isinstance(entry, Op):
                self._queues.setdefault(entry.client, deque()).append(entry)
            else:
                self.later(entry.at, self._fault, entry)
        for client, queue in self._queues.items():
            self._outstanding[client] = 0
            for op in queue:
                self.later(op.at, self._pump, client)
        self.engine.size = self.plan.sectors * SECTOR  # as mount --no-wait --size does
        self.engine.start()
        self._until(self._start + self.plan.end)
        self._heal()
        self._read_back()

    def _until(self, end: float, idle: Callable[[], bool] | None = None) -> None:
        heap = self._heap
        while heap and heap[0][0] <= end:
            if idle is not None and idle():
                return
            self.now, _, call, arguments = heapq.heappop(heap)
            call(*arguments)
            self.events += 1
            if self.engine.state is State.FAULTED:
                raise Violation("faulted", self.engine.reason)
            if self.events > MAX_EVENTS:
                raise Violation("busy", f"{MAX_EVENTS} events and no end")
        self.now = max(self.now, end) if idle is None else self.now

    # --- the guests ------------------------------------------------------------------------

    def _pump(self, client: int) -> None:
        queue = self._queues[client]
        while queue and self._start + queue[0].at <= self.now:
            if self._outstanding[client] >= self.plan.depth:
                return
            self._submit(queue.popleft())

    def _submit(self, op: Op) -> None:
        self.say(f"guest {op.client}: {op}")
        data = None
        if op.kind is Kind.WRITE:
            data = encode([value_of(op, index) for index in range(op.count)])
        request = Request(
            op.kind,
            op.sector * SECTOR,
            op.count * SECTOR,
            self._answered,
            data=data,
            fua=op.fua,
            may_unmap=op.kind is Kind.WRITE_ZEROES and op.id % 2 == 0,
            owner=op,
        )
        self._requests[op.id] = request
        self._outstanding[op.client] += 1
        self.oracle.submitted(op)
        self.engine.submit(request)
        if op.cancel:
            self.later(op.cancel, self._cancel, op)

    def _cancel(self, op: Op) -> None:
        if op.id not in self.oracle.answered:
            self.say(f"guest {op.client}: gives up {op}")
            self._cancelled.add(op.id)
            self.engine.cancel(self._requests[op.id])
            if op.id not in self.oracle.answered:
                raise Violation("lost answer", f"{op} was cancelled and is not answered")

    def _answered(self, request: Request, errno: int, data: Any) -> None:
        op: Op = request.owner
        self.say(f"answer {op}: {e.errorcode[errno] if errno else 'done'}")
        self.oracle.answer(op)
        direction = "read" if op.kind is Kind.READ else "write"
        self._outstanding[op.client] -= 1
        if self._queues[op.client]:
            self.later(0.0, self._pump, op.client)
        outside = op.sector + op.count > self.plan.sectors
        if outside and errno != e.EINVAL:
            raise Violation("refused", f"{op} is outside the disk and was answered {errno}")
        if errno:
            excused = outside or op.id in self._refused or op.id in self._cancelled
            if not excused and not self._may_fail[direction]:
                raise Violation("error", f"{op}: {e.errorcode[errno]} against the policy")
            return
        done_by_backend = self._completing is request
        if not done_by_backend and self._may_ignore[direction] and op.kind is not Kind.FLUSH:
            return
        if op.kind is Kind.READ:
            self.oracle.read(op, decode(data))
        else:
            self.oracle.done(op)

    # --- Effects ---------------------------------------------------------------------------

    def send(self, request: Request) -> None:
        if self.trace is not None:
            self.say(f"  send {request.owner or request}")
        if not self._linked:
            raise Violation("sent nowhere", f"{request} was sent without a connection")
        self.server.receive(request)

    def release(self, request: Request) -> None:
        op = request.owner
        if not isinstance(op, Op):
            return
        if op.id in self._released:
            raise Violation("released twice", str(op))
        self._released.add(op.id)
        if request.data is not None:  # whoever still reads it shall be seen
            request.data[:] = encode([POISON]) * op.count  # type: ignore[index]

    def connect(self) -> None:
        self.later(0.002, self._try)

    def close(self) -> None:
        self.say("  close")
        self._linked = False
        self.server.break_off(crash=False)

    def fence(self) -> None:
        works = self.plan.options.fence and self.plan.seed % 3 != 0
        self.later(0.5, self._fenced, works)

    def _fenced(self, works: bool) -> None:
        self.say(f"fence: {works}")
        if works:
            self.server.fence()
        self.engine.fenced(works)  # type: ignore[attr-defined]

    def wake_at(self, when: float) -> None:
        # A timer never fires at once: an engine whose sums differ by a rounding would spin for ever.
        self.later(max(when - self.now, 1e-6), self.engine.wake)

    def event(self, name: str, data: dict[str, object]) -> None:
        if self.trace is not None:
            self.say(f"  event {name} {data}")

    # --- the backend's side ----------------------------------------------------------------

    def _try(self) -> None:
        if self.engine.state is State.CLOSED:
            return
        if self.now < self.server.away_until:
            self.engine.connect_failed(e.ECONNREFUSED)
        elif self.now < self.server.other_until:
            self.say("another disk answers")
            self.engine.connected(
                self.plan.sectors * SECTOR, mismatch="another disk", **self._geometry
            )
        else:
            session = self.server.accept()
            self.say(f"connected: session {session}")
            self._linked = True
            self.engine.connected(self.plan.sectors * SECTOR, align=SECTOR, **self._geometry)

    def reply(self, request: Request, errno: int, data: bytearray | None) -> None:
        if self.trace is not None:
            result = e.errorcode[errno] if errno else "ok"
            self.say(f"  reply {request.owner or request}: {result}")
        if errno in REFUSED and isinstance(request.owner, Op):
            self._refused.add(request.owner.id)
        self._completing = None if errno else request
        self.engine.completed(request, errno, data)
        self._completing = None
        if data is not None:  # valid until the callback returned, and no longer
            data[:] = encode([POISON]) * (len(data) // SECTOR)

    def disconnect(self, *, crash: bool, notice: float) -> None:
        session = self.server.session
        if session:
            self.server.break_off(crash=crash)
            self.later(notice, self._notice, session)

    def _notice(self, session: int) -> None:
        """The client learns of it, unless it gave up by itself meanwhile."""
        if self.server.session == 0 and session == self.server.last_session:
            self.say(f"lost session {session}")
            self.engine.lost(e.ECONNRESET)

    def stable_changed(self, sector: int, value: int) -> None:
        self.oracle.stable_is(sector, value)

    # --- faults ----------------------------------------------------------------------------

    def _fault(self, fault: Fault) -> None:
        self.say(f"FAULT {fault}")
        server, until, number = self.server, self.now + fault.seconds, fault.number
        match fault.name:
            case "errno":
                server.fail_next, server.which_errno = 1 + number % 4, number >> 4
            case "delay":
                server.delay_next = 1 + number % 4
            case "hang":
                server.hang_next = 1 + number % 2
            case "freeze":
                server.frozen_until = until
            case "disconnect":
                self.disconnect(crash=number % 4 != 0, notice=0.001 if number & 16 else 0.05)
            case "away":
                server.away_until = until
                self.disconnect(crash=True, notice=0.001)
            case "relapse":
                server.relapse_until = until
                self.disconnect(crash=True, notice=0.001)
            case "enospc":
                server.full_until = until
            case "refused_entry":
                server.stubborn_until = until
                self.disconnect(crash=True, notice=0.001)
            case "bad_sector":
                server.bad_sectors.add(number % self.plan.sectors)
            case "identity":
                server.other_until = until
                self.disconnect(crash=True, notice=0.001)
            case "policy":
                self._set_policy(_POLICIES[number % len(_POLICIES)])
            case "pause":
                self.engine.pause()
                self.later(fault.seconds, self.engine.resume)
            case "reconnect":
                self.engine.reconnect()  # type: ignore[attr-defined]
            case other:
                raise ValueError(other)

    def _set_policy(self, policy: Policy) -> None:
        for direction, given in (("read", policy.read), ("write", policy.write)):
            may_fail = given.error is not Action.RETRY or given.retry_timeout > 0
            self._may_fail[direction] |= may_fail
            self._may_ignore[direction] |= Action.IGNORE in (given.error, given.then)
        self.engine.set_policy(policy)

    # --- the second phase ------------------------------------------------------------------

    def _heal(self) -> None:
        """Nothing goes wrong any more: everything must end, soon."""
        self.say("HEAL")
        self.server.calm()
        self._heap = [entry for entry in self._heap if entry[2] != self._fault]
        heapq.heapify(self._heap)
        self._set_policy(Policy())
        self.engine.resume()
        if self.plan.options.hang or self.plan.seed % 2:
            # What hangs for ever ends with its connection.
            self.disconnect(crash=True, notice=0.001)
        self._finish("after everything was healed")

    def _finish(self, when: str) -> None:
        def idle() -> bool:
            if any(self._queues.values()):
                return False
            return not any(self._outstanding.values())

        end = self.now + HEALED_WITHIN
        self._until(end, idle)
        if not idle():
            waiting = ", ".join(str(op) for op in self.oracle.unanswered()[:5])
            raise Violation("lost answer", f"{when}: {waiting} (state {self.engine.state})")

    def _read_back(self) -> None:
        """A flush, every sector read, and then what is left after the cache is gone."""
        self._may_fail = {"read": False, "write": False}
        self._may_ignore = {"read": False, "write": False}
        at = self.now - self._start
        self._queues[0] = deque()
        self._outstanding.setdefault(0, 0)
        self._submit(Op(at, 1 << 20, 0, Kind.FLUSH, 0, 0))
        self._finish("the last flush")
        self._submit(Op(at, (1 << 20) + 1, 0, Kind.READ, 0, self.plan.sectors))
        self._finish("the last read")
        kept = [
            op
            for op, request in self._requests.items()
            if op not in self._released and request.data is not None
        ]
        if kept:
            raise Violation("kept payload", f"after a flush: #{kept[0]} and {len(kept) - 1} more")

    @property
    def virtual_seconds(self) -> float:
        return self.now - self._start

    @property
    def requests(self) -> int:
        return len(self._requests)
