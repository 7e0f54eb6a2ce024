"""The world around the engine: a virtual clock, guests, the operator, and Effects."""

from __future__ import annotations

import errno as e
import heapq
import logging
import random
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from healfs.backends.align import AlignedBackend, Data
from healfs.backends.base import Backend, Geometry
from healfs.core.engine import Engine, Limits
from healfs.core.policy import Action, DirectionPolicy, Policy
from healfs.core.request import Done, Kind, Request, oldest_first
from healfs.core.ring import PayloadRing, Slot
from healfs.core.states import State
from healfs.core.writelog import WriteLog, memory_size
from tests.sim.death import Death, Stores
from tests.sim.disk import REFUSED, Server
from tests.sim.faults import strike
from tests.sim.oracle import POISON, Oracle, Violation, decode, encode, op_id, tag_of, value_of
from tests.sim.plan import SECTOR, Fault, Op, Plan, chance

TIMED_OUT_WITHIN = 60.0  # virtual seconds, under a policy with a timeout
HEALED_WITHIN = 60.0  # virtual seconds until every request must be answered
RING = 256 << 10  # bytes of payloads: small, so that it is full now and then
MAX_EVENTS = 400_000


class _Bugs(logging.Handler):
    """Takes what the engine logs of a bug of its own, in place of the terminal."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.format(record)


class _WatchedRing(PayloadRing):
    def __init__(self, memory: memoryview, released: Callable[[Slot], None]) -> None:
        super().__init__(memory, RING // 4)
        self.released = released

    def release(self, slot: Slot) -> None:
        self.released(slot)
        super().release(slot)


class _Connected(Backend):
    """The server, as what AlignedBackend wraps."""

    source = "the simulated disk"

    def __init__(self, server: Server, geometry: Geometry) -> None:
        self.submit = server.receive  # type: ignore[method-assign]
        self._untaken = server.untaken
        self._geometry = geometry

    async def connect(self) -> Geometry:
        return self._geometry

    async def serve(self) -> OSError:
        raise NotImplementedError

    def submit(self, request: Request, done: Done) -> None: ...
    def commit(self) -> None: ...
    def close(self) -> None: ...

    def taken(self, request: Request) -> bool:
        return id(request) not in self._untaken


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
        self.block = SECTOR
        if plan.options.blocks:
            self.block = SECTOR << 1 + int(chance(plan.seed, 5) * 3)
        self.events = 0
        self.happened: Counter[str] = Counter()  # of what chance decides, when it is really so
        self.stores = Stores()
        self.server = Server(plan, self, self.block)
        self.oracle = Oracle(plan.sectors, lambda sector: self.server.disk.stable[sector])
        self._aligned = self._new_backend()
        self._make_engine = engine
        if plan.options.limits:
            more.setdefault("limits", Limits(in_flight=1 << int(chance(plan.seed, 6) * 5)))
            more.setdefault("slow_after", (0.0, 0.3, 1.0, 5.0)[int(chance(plan.seed, 7) * 4)])
        more.setdefault("settle", plan.settle)
        more.setdefault("fence", plan.options.fence and plan.seed % 2 == 0)
        if plan.options.probe:
            more.setdefault("ambiguous", frozenset({e.EIO, e.EROFS}))
        self._memory = memoryview(bytearray(memory_size(RING, 1024)))
        self._keywords = more
        self._alarm = 0  # the last one that was set
        self.engine = self._new_engine()
        self._queues: dict[int, deque[Op]] = {}
        self._outstanding: dict[int, int] = {}
        self._requests: dict[int, Request] = {}
        self._healed = False
        self._ops: dict[int, Op] = {}
        self._submitted: dict[int, float] = {}
        self._bugs = _Bugs(logging.ERROR)
        self._linked = False  # as the engine was told, and told us
        self._trying = False  # a connect is on its way
        self._wrong_disk = False  # what it is linked to, and nobody accepted that
        self._accepted: str | None = None  # by the operator, for one try: replay, or drop
        self._completing: Request | None = None
        self._refused: set[int] = set()
        self._cancelled: set[int] = set()
        # The policies since a request came: any may have decided what it is answered.
        self._policy = Policy()
        self._policy_since = self._start  # or since the last pause
        self._policies: dict[int, list[DirectionPolicy]] = {}  # by the op's id

    def _new_backend(self) -> AlignedBackend:
        geometry = Geometry(
            self.plan.sectors * SECTOR, minimum_block=self.block, maximum_payload=1 << 20
        )
        backend = AlignedBackend(_Connected(self.server, geometry))
        with suppress(StopIteration):
            backend.connect().send(None)
        return backend

    def _new_engine(self) -> Engine:
        self._released: dict[int, Slot] = {}
        log = WriteLog(self._memory, 1024, RING // 4)
        log.ring = _WatchedRing(self._memory[-RING:], self._release)
        self.stores.watch(log)
        return self._make_engine(
            self,
            Policy(),
            lambda: self.now,
            log,
            rng=random.Random(self.plan.seed),
            **self._keywords,
        )

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
        logger = logging.getLogger("healfs.engine")
        logger.addHandler(self._bugs)
        logger.propagate = False
        try:
            self.engine.start()
            self._look()
            self._until(self._start + self.plan.end)
            self._heal()
            self._read_back()
        finally:
            logger.propagate = True
            logger.removeHandler(self._bugs)

    def _until(self, end: float, idle: Callable[[], bool] | None = None) -> None:
        heap = self._heap
        while heap and heap[0][0] <= end:
            if idle is not None and idle():
                return
            self.now, _, call, arguments = heapq.heappop(heap)
            try:
                call(*arguments)
            except Death:
                self._killed()
            self.events += 1
            if self.engine.state is State.FAULTED:
                raise Violation("faulted", self._bugs.text)
            if self.events > MAX_EVENTS:
                raise Violation("busy", f"{MAX_EVENTS} events and no end")
        self.now = max(self.now, end) if idle is None else self.now

    # --- the guests ------------------------------------------------------------------------

    def _look(self) -> None:
        """Nobody waits for ever under a policy that ends."""
        if self.engine.state is State.PAUSED or not self.engine.slow_after:
            self._policy_since = self.now
        for op in self.oracle.unanswered():
            policy = self._policy.of(op.kind)
            ends = policy.times_out and policy.then in (Action.REPORT, Action.IGNORE)
            since = max(self._policy_since, self._submitted[op.id])
            if ends and self.now > since + TIMED_OUT_WITHIN:
                raise Violation("waits", f"{op} since {since - self._start:.3f}")
        self.later(5.0, self._look)

    def _pump(self, client: int) -> None:
        queue = self._queues[client]
        while queue and self._start + queue[0].at <= self.now:
            if self._outstanding[client] >= self.plan.depth:
                return
            self._submit(queue.popleft())

    def _submit(self, op: Op) -> None:
        self.say(f"guest {op.client}: {op}")
        self._ops[op.id] = op
        self._outstanding[op.client] += 1
        self._submitted[op.id] = self.now
        self._policies[op.id] = [self._policy.of(op.kind)]
        self.oracle.submitted(op)
        request = self._request(op)
        self.engine.submit(request)
        if op.cancel:
            self.later(op.cancel, self._cancel, op)

    def _request(self, op: Op, *, again: bool = False) -> Request:
        data = None
        if op.kind is Kind.WRITE:
            data = encode([value_of(op, index, again=again) for index in range(op.count)])
        request = Request(
            op.kind,
            op.sector * SECTOR,
            op.count * SECTOR,
            self._answered,
            data=data,
            fua=op.fua,
            may_unmap=op.kind is Kind.WRITE_ZEROES and op.id % 2 == 0,
            tag=tag_of(op, self.oracle.order_of(op), again=again),
        )
        if data is not None:
            slot = self.engine.log.ring.store(data)
            if slot is None:  # as the channel does when the ring is full
                slot = self._outside(data)
            slot.request, request.owner, request.data = request, slot, slot.data
        self._requests[op.id] = request
        return request

    def _cancel(self, op: Op) -> None:
        if op.id not in self.oracle.answered:
            self.say(f"guest {op.client}: gives up {op}")
            self.happened["cancel"] += 1
            self._cancelled.add(op.id)
            self.engine.cancel(self._requests[op.id])
            if op.id not in self.oracle.answered:
                raise Violation("lost answer", f"{op} was cancelled and is not answered")

    def _answered(self, request: Request, errno: int, data: Any) -> None:
        op = self._ops[op_id(request)]
        self.say(f"answer {op}: {e.errorcode[errno] if errno else 'done'}")
        self.oracle.answer(op)
        policies = self._policies.pop(op.id)
        self._outstanding[op.client] -= 1
        if self._queues[op.client]:
            self.later(0.0, self._pump, op.client)
        outside = op.sector + op.count > self.plan.sectors
        if outside and errno != e.EINVAL:
            raise Violation("refused", f"{op} is outside the disk and was answered {errno}")
        if errno:
            excused = outside or op.id in self._refused or op.id in self._cancelled
            may_fail = any(p.error is not Action.RETRY or p.retry_timeout for p in policies)
            if not excused and not may_fail:
                raise Violation("error", f"{op}: {e.errorcode[errno]} against the policy")
            return
        done_by_backend = self._completing is request
        may_ignore = any(Action.IGNORE in (p.error, p.then) for p in policies)
        if may_ignore and op.kind is not Kind.FLUSH and (op.fua or not done_by_backend):
            return
        if op.kind is Kind.READ:
            self.oracle.read(op, decode(data))
        else:
            self.oracle.done(op, stable=done_by_backend and self.server.through)

    # --- Effects ---------------------------------------------------------------------------

    def send(self, request: Request, done: Done) -> None:
        if self.trace is not None:
            self.say(f"  send {self._name(request)}")
        if not self._linked or self._wrong_disk:
            raise Violation("sent nowhere", f"{request} was sent without a connection")
        if self.engine.state is State.PAUSED and request.kind is not Kind.FLUSH:
            raise Violation("sent in a pause", str(self._name(request)))
        self._aligned.submit(request, self.reply)
        if self.block > SECTOR:
            self.later(0.0, self._commit)

    def _commit(self) -> None:
        self._aligned.commit()  # of the worker that lives then

    def _name(self, request: Request) -> object:
        return request if request.internal else self._ops.get(op_id(request), request)

    def _outside(self, data: bytearray) -> Slot:
        self.engine.log.ring.overflow += len(data)
        return Slot(data, 0, 0)

    def _release(self, slot: Slot) -> None:
        """Before the ring has it: whoever still reads a payload that was let go shall be seen."""
        if id(slot) in self._released and self._released[id(slot)] is slot:
            raise Violation("released twice", str(slot.request))
        self._released[id(slot)] = slot
        if not slot.pinned and not self.server.still_reading:
            slot.data[:] = encode([POISON]) * (len(slot.data) // SECTOR)

    def taken(self, request: Request) -> bool:
        return self._aligned.taken(request)

    def heard(self) -> float:
        return 0.0

    def connect(self) -> None:
        if not self._trying:  # one at a time, as the worker's
            self._trying = True
            self.later(0.002, self._try, self.engine)

    def close(self) -> None:
        self.say("  close")
        self._linked = False
        self._aligned.close()
        self.server.break_off(crash=False)

    def fence(self) -> None:
        works = self._healed or int(self.now * 1000) % 3 == 0
        self.later(0.5, self._fenced, self.engine, works)

    def _fenced(self, who: Engine, works: bool) -> None:
        if who is not self.engine:
            return
        self.say(f"fence: {works}")
        if works:
            self.server.fence()
        self.engine.fenced("" if works else "no power switch")

    def probe(self) -> None:
        self.later(0.02, self._probed, self.engine)

    def _probed(self, who: Engine) -> None:
        if who is not self.engine:
            return
        away = "the device is offline" if self.now < self.server.offline_until else ""
        self.say(f"probe: {away or 'it is there'}")
        self.happened["probed away" if away else "probed there"] += 1
        if away:
            self.server.break_off(crash=True)
        self.engine.probed(away)

    def wake_at(self, when: float) -> None:
        # A timer never fires at once: else sums that differ by a rounding would spin for ever.
        self._alarm += 1
        self.later(max(when - self.now, 1e-6), self._wake, self._alarm)

    def _wake(self, alarm: int) -> None:
        if alarm == self._alarm:  # else another one, or another worker's, was set since
            self.engine.wake()

    def event(self, name: str, data: dict[str, object]) -> None:
        if self.trace is not None:
            self.say(f"  event {name} {data}")

    # --- the backend's side ----------------------------------------------------------------

    def _try(self, who: Engine) -> None:
        if who is not self.engine:
            return  # its worker is dead
        self._trying = False
        accepted, self._accepted = self._accepted, None
        self._wrong_disk = False
        if self.now < max(self.server.away_until, self.server.offline_until):
            self.engine.connect_failed(e.ECONNREFUSED)
        elif self.now < self.server.other_until:
            self.say(f"another disk answers; accepted: {accepted}")
            self._wrong_disk = accepted is None
            if accepted:
                self.server.other_until = 0.0  # from now on it is the right one
            if accepted == "drop":
                self.oracle.dropped()
            self.server.accept()
            self._linked = True
            self.engine.connected(
                self.plan.sectors * SECTOR,
                align=self.block,
                mismatch="another disk",
                volatile_cache=not self.server.through,
            )
        else:
            session = self.server.accept()
            self.say(f"connected: session {session}")
            self._linked = True
            self.engine.connected(
                self.plan.sectors * SECTOR,
                align=self.block,
                volatile_cache=not self.server.through,
            )

    def reply(self, request: Request, errno: int, data: Data) -> None:
        if self.trace is not None:
            result = e.errorcode[errno] if errno else "ok"
            self.say(f"  reply {self._name(request)}: {result}")
        if errno in REFUSED and not request.internal:
            self._refused.add(op_id(request))
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
        strike(self, fault)

    def accept(self, how: str) -> None:
        if self.engine.state is State.MISMATCH:
            self.say(f"the operator accepts: {how}")
            self._accepted = how
            self.engine.accept(replay=how == "replay")

    def set_policy(self, policy: Policy) -> None:
        self._policy = policy
        self._policy_since = self.now
        for id, policies in self._policies.items():
            policies.append(policy.of(self._ops[id].kind))
        self.engine.set_policy(policy)

    def fail(self) -> None:
        waiting = self.oracle.unanswered()
        self._cancelled.update(op.id for op in waiting)
        given_up = self.engine.fail_all()
        if left := [op for op in waiting if op.id not in self.oracle.answered]:
            raise Violation("lost answer", f"{left[0]} was failed and is not answered")
        if sum(n["requests"] for n in given_up.values()) != len(waiting):
            raise Violation("miscounted", f"{len(waiting)} were failed, not {given_up}")

    def callers_go(self, number: int) -> None:
        for op in self.oracle.unanswered():
            if chance(self.plan.seed, number, op.id) < 0.5:
                self._cancel(op)

    def worker_dies(self) -> None:
        """kill -9: what the kernel has no answer for comes again, to a successor on the memory
        that was left. The callers' pages may have changed since."""
        self.server.break_off(crash=False)
        self._linked = self._trying = False
        self._accepted = None
        self._aligned = self._new_backend()
        self._alarm += 1
        self.engine = self._new_engine()
        self.engine.take_over()
        if not self.engine.size:  # it died before the first connection
            self.engine.size = self.plan.sectors * SECTOR
        waiting = self.oracle.unanswered()
        waiting.sort(key=lambda op: chance(self.plan.seed, op.id))  # the kernel: in no useful order
        for request in oldest_first([self._request(op, again=True) for op in waiting]):
            self.say(f"again: {self._name(request)}")
            self.engine.submit(request)
        self.engine.resent()
        self.engine.start()

    def _killed(self) -> None:
        self.say("DEATH between two stores")
        self.happened["killed"] += 1
        self._completing = None
        self.worker_dies()
        for client in self._queues:  # whatever was going on in the world goes on
            self.later(0.0, self._pump, client)

    # --- the second phase ------------------------------------------------------------------

    def _heal(self) -> None:
        """Nothing goes wrong any more: everything must end, soon."""
        self.say("HEAL")
        self._healed = True
        self.stores.disarm()
        self.server.calm()
        self._heap = [e for e in self._heap if e[2] not in (self._fault, self._look)]
        heapq.heapify(self._heap)
        self.set_policy(Policy())
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
        at = self.now - self._start
        self._queues[0] = deque()
        self._outstanding.setdefault(0, 0)
        self._submit(Op(at, 1 << 20, 0, Kind.FLUSH, 0, 0))
        self._finish("the last flush")
        self._submit(Op(at, (1 << 20) + 1, 0, Kind.READ, 0, self.plan.sectors))
        self._finish("the last read")  # it waited for the writes that nobody waits for any more
        self._submit(Op(at, (1 << 20) + 2, 0, Kind.FLUSH, 0, 0))
        self._finish("the very last flush")
        log = self.engine.log
        if len(log) or log.ring.used or log.ring.overflow:
            left = f"{len(log)} entries, {log.ring.used} and {log.ring.overflow} bytes"
            raise Violation("kept payload", f"after a flush the log holds {left}")

    @property
    def virtual_seconds(self) -> float:
        return self.now - self._start

    @property
    def requests(self) -> int:
        return len(self._requests)
