"""The engine: park, send, answer, stall, pause. Plain synchronous code without I/O.

One object owns all state of a disk. Events come in as calls (submit, completed, lost, connected,
wake, ...), effects go out through the small interface Effects. Time comes from the given clock,
chance from the given generator, so the whole engine runs in a simulator.

The order (DESIGN.md, "The engine"): a write waits for older overlapping writes, a read waits for
older overlapping writes, a read holds back nothing, disjoint requests never wait for each other.
"""

from __future__ import annotations

import errno as e
import logging
import math
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from healfs.core import errors
from healfs.core.errors import ErrorClass
from healfs.core.outage import Outage
from healfs.core.overlap import Overlap
from healfs.core.policy import Action, Policy
from healfs.core.prober import Prober
from healfs.core.request import Kind, Phase, Request
from healfs.core.retries import Retries
from healfs.core.states import State, check_move
from healfs.core.totals import Totals

log = logging.getLogger("healfs.engine")

EVENT_GAP = 1.0  # seconds between two BLOCK_IO_ERROR events that say the same
READ, WRITE, FLUSH = Kind.READ, Kind.WRITE, Kind.FLUSH
IN_FLIGHT, PARKED, WAITING, DONE = Phase.IN_FLIGHT, Phase.PARKED, Phase.WAITING, Phase.DONE


class Effects(Protocol):
    """What the engine asks of the world. None of these may call the engine back at once,
    but `send` (which may complete a request before it returns)."""

    def send(self, request: Request) -> None: ...
    def release(self, request: Request) -> None:
        """The engine needs the request's payload no more."""

    def connect(self) -> None:
        """Try once to reach the backend; ends in `connected` or `connect_failed`."""

    def close(self) -> None:
        """Give up the connection: no completion of it may come any more."""

    def wake_at(self, when: float) -> None:
        """Call `wake` at `when` (the clock's time), or earlier."""

    def event(self, name: str, data: dict[str, object]) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    in_flight: int = 512  # requests handed to the backend at once; more are parked
    failed_retries_per_second: int = 100  # of all failed requests together


class Engine:
    """See the module's text. Public methods may be called from one thread only."""

    def __init__(
        self,
        effects: Effects,
        policy: Policy,
        clock: Callable[[], float],
        *,
        slow_after: float = 5.0,
        limits: Limits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.effects = effects
        self.policy = policy
        self.clock = clock
        self.slow_after = slow_after  # 0: never
        self._silence = slow_after or math.inf
        self.limits = limits or Limits()
        self.state = State.CONNECTING
        self.since = clock()
        self.reason = ""
        self.size = 0
        self.align = 1
        self.can_flush = True
        rng = rng or random.Random()
        self._order = 0
        self._in_flight: dict[int, Request] = {}
        self._parked: OrderedDict[int, Request] = OrderedDict()  # may be sent, oldest first
        self._waiting: dict[int, Request] = {}  # behind an older overlapping write
        self._retries = Retries(rng, self.limits.failed_retries_per_second)
        self._writes = Overlap()  # not out of the backend's hands yet

        self.link_up = False
        self._ever_connected = False
        self._mismatch = ""
        self.paused_by = ""  # "operator" or "policy" while paused
        self._paused_errno = 0
        self._told: dict[tuple[str, int, Action], float] = {}
        self._draining = False
        self._last_answer = 0.0
        self._probe_at = 0.0
        self._alarm: float | None = None

        self._prober = Prober(rng)
        self._outage = Outage(self.since)
        self.totals = Totals()

    # --- requests ---------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Take a request. It will be answered exactly once, by request.on_answer."""
        try:
            self._submit(request)
        except Exception:
            self._fault("submit")

    def _submit(self, request: Request) -> None:
        self._order = request.order = self._order + 1
        request.arrived = now = self.clock()
        kind = request.kind
        if kind is not FLUSH:
            if request.offset < 0 or request.end > self.size:
                self._answer(request, e.EINVAL, None)
                self._retire(request)
                return
            if self.align > 1:
                request.start -= request.start % self.align
                request.end += -request.end % self.align
            self._wait_for_older(request)
            if request.blockers:
                request.phase = WAITING
                self._waiting[request.order] = request
                if self._outage.since is not None:
                    self._judge_in_outage(request, now)
                return
        if self._may_send():
            self._send(request, now)
            return
        self._park(request)
        if self._outage.since is not None:
            self._judge_in_outage(request, now)

    def _wait_for_older(self, request: Request) -> None:
        found = self._writes.find(request.start, request.end)
        is_write = request.kind is not READ
        for older in found:
            assert isinstance(older, Request)
            if older.waiters is None:
                older.waiters = [request]
            else:
                older.waiters.append(request)
            # Whoever comes next waits for this write and so for the older one that it covers:
            # a thousand writes to one block cost a thousand steps, not a million.
            if is_write and request.start <= older.start and older.end <= request.end:
                self._writes.remove(older)
                older.indexed = False
        request.blockers = len(found)
        if is_write:
            self._writes.add(request)
            request.indexed = True

    def _may_send(self) -> bool:
        return (
            self.state is State.READY
            and not self._parked
            and len(self._in_flight) < self.limits.in_flight
        )

    def _park(self, request: Request) -> None:
        request.phase = PARKED
        self._parked[request.order] = request
        if self._outage.since is not None:
            self._outage.waited += 1

    def _send(self, request: Request, now: float) -> None:
        if request.kind is FLUSH and not self.can_flush:
            # As QEMU's NBD client does; status says what such a flush is worth.
            self._answer(request, 0, None)
            self._retire(request)
            return
        request.phase = IN_FLIGHT
        request.sent = now
        request.attempts += 1
        self._in_flight[request.order] = request
        if self._alarm is None:
            self._wake_at(now + self._silence)
        self.effects.send(request)

    def _send_parked(self) -> None:
        if self.state is not State.READY or not self._parked:
            return
        now = self.clock()
        while self._parked and len(self._in_flight) < self.limits.in_flight:
            _, request = self._parked.popitem(last=False)
            self._send(request, now)

    def completed(self, request: Request, errno: int, data: object = None) -> None:
        """The backend's answer to a request that was sent on this connection."""
        try:
            if self._in_flight.pop(request.order, None) is not request:
                raise RuntimeError(f"a second completion of {request}")
            self._last_answer = self.clock()
            if errno and not request.answered:
                self._completed_with_error(request, errno)
            else:
                if not request.answered:
                    self._answer(request, 0, data)
                self._retire(request)
            if self._outage.since is not None:
                self._answered_again()
            if self._parked:
                self._send_parked()
            if self._draining and not self._in_flight:
                self._drained()
        except Exception:
            self._fault("completed")

    def _answer(self, request: Request, errno: int, data: object) -> None:
        if request.answered:
            raise RuntimeError(f"a second answer to {request}")
        request.answered = True
        self.totals.count(request.kind, request.length, errno)
        request.on_answer(request, errno, data)  # type: ignore[arg-type]

    def _retire(self, request: Request) -> None:
        """Out of the backend's hands: whoever waited behind it may go."""
        done = [request]
        while done:
            request = done.pop()
            request.phase = DONE
            if request.indexed:
                self._writes.remove(request)
                request.indexed = False
            self.effects.release(request)
            waiters, request.waiters = request.waiters, None
            for waiter in waiters or ():
                waiter.blockers -= 1
                if waiter.blockers:
                    continue
                del self._waiting[waiter.order]
                if waiter.answered:
                    done.append(waiter)
                elif self._may_send():
                    self._send(waiter, self.clock())
                else:
                    self._park(waiter)

    def cancel(self, request: Request, errno: int = e.EINTR) -> None:
        """Answer now, whatever the policy says: whoever asked is gone, or gives up.

        What is in flight stays in the backend's hands and goes on holding back newer writes.
        """
        try:
            if not request.answered:
                self._give_up(request, errno)
        except Exception:
            self._fault("cancel")

    def _give_up(self, request: Request, errno: int, data: object = None) -> None:
        parked = request.phase is PARKED
        if parked:
            self._parked.pop(request.order, None)
            self._retries.discard(request)
        self._answer(request, errno, data)
        if parked:
            self._retire(request)

    def fail_all(self, errno: int = e.EIO) -> dict[str, dict[str, int]]:
        """Answer everything with an error; returns what was given up: {kind: {requests, bytes}}."""
        given_up: dict[str, dict[str, int]] = {}
        for request in list(self._unanswered()):
            entry = given_up.setdefault(request.kind.name.lower(), {"requests": 0, "bytes": 0})
            entry["requests"] += 1
            entry["bytes"] += request.length
            self.cancel(request, errno)
        return given_up

    def _unanswered(self) -> Iterator[Request]:
        for group in (self._in_flight.values(), self._retries, self._parked.values()):
            yield from (r for r in group if not r.answered)
        yield from (r for r in self._waiting.values() if not r.answered)

    # --- errors and the policy --------------------------------------------------------------

    def _completed_with_error(self, request: Request, errno: int) -> None:
        match errors.classify(errno):
            case ErrorClass.REFUSED:
                self._answer(request, errors.for_guest(errno), None)
                self._retire(request)
            case ErrorClass.LOST:
                self._in_flight[request.order] = request  # parked with all the others
                self._lose(errno, f"{os.strerror(errno)}: {errors.reason(errno)}")
            case ErrorClass.FAILED:
                self._judge_failed(request, errno, self.clock())

    def _judge_failed(self, request: Request, errno: int, now: float) -> None:
        """Decide on one failed request, which is in no group of requests now."""
        request.errno = errno
        first = not request.first_error
        if first:
            request.first_error = now
        action = self.policy.of(request.kind).decide(request.kind, errno, now - request.first_error)
        if self.state is State.PAUSED:
            action = Action.STOP
        if first or action is not Action.RETRY:
            self._io_error(request.kind, errno, action)
        request.phase = PARKED
        if action is Action.RETRY:
            self._wake_at(self._retries.add(request, self.policy.of(request.kind), now))
        elif action is Action.STOP:
            self._park_again([request])
            self._stop_by_policy(errno)
        else:
            self._act(request, action, errno)

    def _act(self, request: Request, action: Action, errno: int) -> None:
        """Report or ignore, for a request that is parked, waiting or in flight."""
        if action is Action.IGNORE:
            self.totals.ignored_bytes += request.length
            zeroes = bytes(request.length) if request.kind is READ else None
            self._give_up(request, 0, zeroes)
        else:
            self._give_up(request, errors.for_guest(errno))

    def _judge_in_outage(self, request: Request, now: float) -> None:
        """Decide on a request that comes while the backend is away."""
        if self.state not in (State.STALLED, State.CONNECTING, State.MISMATCH):
            return
        errno = self._outage.errno
        action = self.policy.of(request.kind).decide(request.kind, errno, self._outage.age(now))
        if action is Action.STOP:
            self._io_error(request.kind, errno, action)
            self._stop_by_policy(errno)
        elif action is not Action.RETRY:
            self._act(request, action, errno)

    def _judge_all_in_outage(self, now: float) -> None:
        if self._outage.since is None:
            return
        errno, age = self._outage.errno, self._outage.age(now)
        actions = [self.policy.of(kind).decide(kind, errno, age) for kind in Kind]
        if all(action is Action.RETRY for action in actions):
            return
        for request in list(self._unanswered()):
            self._judge_in_outage(request, now)

    def set_policy(self, policy: Policy) -> None:
        """A new policy, in force at once: it acts on what is parked, too."""
        try:
            self.policy = policy
            now = self.clock()
            if self.paused_by == "policy":
                self._resume(now)
            self._judge_all_in_outage(now)
            for request in self._retries.take_all(now):
                self._judge_failed(request, request.errno, now)
            self._prober.at_most(now + self._longest_pause())
            self._wake_at(now)
        except Exception:
            self._fault("set_policy")

    def _stop_by_policy(self, errno: int) -> None:
        self._paused_errno = errno
        if self.state is not State.PAUSED:
            self._pause_disk("policy", f"{os.strerror(errno)}: {errors.reason(errno)}")

    def _io_error(self, kind: Kind, errno: int, action: Action) -> None:
        operation = "read" if kind is READ else "write"
        now = self.clock()
        key = (operation, errno, action)
        if now - self._told.get(key, -math.inf) < EVENT_GAP:
            return  # a guest that reads a bad sector again and again must not flood the log
        self._told[key] = now
        self.effects.event(
            "BLOCK_IO_ERROR",
            {
                "operation": operation,
                "action": str(action),
                "nospace": errno == e.ENOSPC,
                "reason": os.strerror(errno),
                "errno": errno,
            },
        )

    # --- pause ------------------------------------------------------------------------------

    def pause(self) -> None:
        """QMP stop: answers at once; HEALFS_DRAINED tells when nothing is in flight any more."""
        try:
            if self.state is State.PAUSED:
                self.paused_by = "operator"
            else:
                self._pause_disk("operator", "stop")
        except Exception:
            self._fault("pause")

    def _pause_disk(self, by: str, reason: str) -> None:
        self._move(State.PAUSED, reason)
        self.paused_by = by
        self.effects.event("STOP", {})
        self._draining = True
        if not self._in_flight:
            self._drained()

    def _drained(self) -> None:
        self._draining = False
        self.effects.event("HEALFS_DRAINED", {})

    def resume(self) -> None:
        """QMP cont."""
        try:
            if self.state is State.PAUSED:
                self._resume(self.clock())
        except Exception:
            self._fault("resume")

    def _resume(self, now: float) -> None:
        self.paused_by = ""
        self._draining = False
        self.effects.event("RESUME", {})
        if self._mismatch:
            self._move(State.MISMATCH, self._mismatch)
        elif self.link_up:
            self._move(State.READY, "")
            self._send_parked()
        elif not self._ever_connected:
            self._move(State.CONNECTING, "cont")
        else:
            self._move(State.STALLED, os.strerror(self._outage.errno))
        if not self.link_up and not self._prober.trying:
            self._connect_now()  # the policy is asked again when this try has failed

    # --- the backend comes and goes ---------------------------------------------------------

    def start(self) -> None:
        """Begin to connect, with the disk's size known beforehand (mount --no-wait)."""
        self._connect_now()

    def _connect_now(self) -> None:
        self._prober.begin()
        self.effects.connect()

    def try_now(self) -> None:
        """Something changed outside: a try now may succeed (the socket file appeared)."""
        if self._prober.hint():
            self._connect_now()

    def connected(
        self, size: int, *, align: int = 1, can_flush: bool = True, mismatch: str = ""
    ) -> None:
        """The backend is there. `mismatch` says why it is not the disk it was ("": it is)."""
        try:
            now = self.clock()
            if not self.size:
                self.size = size
            elif size < self.size:
                mismatch = mismatch or f"it has {size} bytes, the disk {self.size}"
            if mismatch:
                self._connected_to_another(mismatch)
                return
            self._mismatch = ""
            self.align = max(self.align, align)
            self.can_flush = can_flush
            self.link_up = True
            self._last_answer = now
            self._prober.up(now)
            if self._ever_connected:
                self.totals.reconnects += 1
            self._ever_connected = True
            if self.state is not State.PAUSED:
                self._move(State.READY, "")
            if not self._parked:
                self._end_outage(now)
            self._send_parked()
        except Exception:
            self._fault("connected")

    def _connected_to_another(self, mismatch: str) -> None:
        self._mismatch = mismatch
        self.effects.close()
        if self.state not in (State.PAUSED, State.MISMATCH):
            self._move(State.MISMATCH, mismatch)
            self.effects.event("HEALFS_MISMATCH", {"reason": mismatch})
        again = self.clock() + self._longest_pause()  # the right one may come back
        self._prober.later(again)
        self._wake_at(again)

    def connect_failed(self, errno: int, reason: str = "") -> None:
        """The try did not succeed; the next one comes after a pause."""
        try:
            now = self.clock()
            self._outage.errno = errno = errno or e.ETIMEDOUT
            self.reason = reason or os.strerror(errno)
            if self.state is State.MISMATCH:
                self._mismatch = ""
                first = not self._ever_connected
                self._move(State.CONNECTING if first else State.STALLED, self.reason)
            self._prober.failed(now, self._longest_pause())
            self._wake_at(self._prober.next_try or now)
            self._judge_all_in_outage(now)
        except Exception:
            self._fault("connect_failed")

    def _longest_pause(self) -> float:
        return min(self.policy.read.retry_interval, self.policy.write.retry_interval)

    def lost(self, errno: int, reason: str = "") -> None:
        """The connection is gone: all that is in flight is parked, one prober tries to return."""
        try:
            if self.link_up:
                self._lose(errno, reason or os.strerror(errno))
        except Exception:
            self._fault("lost")

    def _lose(self, errno: int, reason: str) -> None:
        now = self.clock()
        self.link_up = False
        self.effects.close()
        self._begin_outage(now, errno, reason, now)
        in_flight, self._in_flight = self._in_flight, {}
        again = []
        for request in in_flight.values():
            if request.answered:
                self._retire(request)
            else:
                again.append(request)
        again += self._retries.take_all(now)
        self._park_again(again)
        self._outage.waited += len(again)
        self.totals.retries += len(again)
        if self._draining:
            self._drained()
        self._prober.down(now, self._longest_pause())
        if self._prober.next_try == now:
            self._connect_now()
        else:
            self._wake_at(self._prober.next_try or now)
        self._judge_all_in_outage(now)

    def _park_again(self, requests: list[Request]) -> None:
        """Back into the queue, oldest first (the seed series sent them last-in first-out)."""
        for request in requests:
            request.phase = PARKED
            self._parked[request.order] = request
        self._parked = OrderedDict(sorted(self._parked.items()))

    def _begin_outage(self, now: float, errno: int, reason: str, since: float) -> None:
        if self._outage.begin(since, errno):
            oldest = next(self._unanswered(), None)
            kind = oldest.kind if oldest else WRITE
            action = self.policy.of(kind).decide(kind, errno, now - since)
            self._io_error(kind, errno, action)
        if self.state in (State.READY, State.REPLAYING):
            self._move(State.STALLED, reason)
        self.reason = reason

    def _answered_again(self) -> None:
        """An answer came: the end of a hang, and of an outage."""
        if not self.link_up:
            return
        if self.state is State.STALLED:
            self._move(State.READY, "")
        self._end_outage(self.clock())

    def _end_outage(self, now: float) -> None:
        seconds = self._outage.end(now)
        if seconds is not None:
            self.effects.event(
                "HEALFS_RECOVERED",
                {"seconds": round(seconds, 3), "requests_waited": self._outage.waited},
            )

    # --- time -------------------------------------------------------------------------------

    def _wake_at(self, when: float) -> None:
        if (self._alarm is None or when < self._alarm) and when < math.inf:
            self._alarm = when
            self.effects.wake_at(when)

    def wake(self) -> None:
        """The time asked for with wake_at has come."""
        try:
            self._alarm = None
            now = self.clock()
            if self.state in (State.FAULTED, State.CLOSED):
                return
            if self._prober.next_try is not None and now >= self._prober.next_try:
                self._connect_now()
            self._retry_failed(now)
            self._look_for_silence(now)
            self._judge_all_in_outage(now)
            self._set_alarm(now)
        except Exception:
            self._fault("wake")

    def _retry_failed(self, now: float) -> None:
        while (request := self._retries.due(now)) is not None:
            policy = self.policy.of(request.kind)
            age = now - request.first_error
            if policy.decide(request.kind, request.errno, age) is not Action.RETRY:
                self._judge_failed(request, request.errno, now)
                continue
            self.totals.retries += 1
            if self.state is State.READY:
                self._send(request, now)
            else:
                self._park_again([request])

    def _look_for_silence(self, now: float) -> None:
        """No answer at all is an outage, too; one request may hang while others are answered."""
        if not self.link_up or not self._in_flight:
            return
        oldest = next(iter(self._in_flight.values()))
        silent_since = max(self._last_answer, oldest.sent)
        if self._outage.since is None and now - silent_since >= self._silence:
            reason = f"no answer for {self.slow_after:g} s"
            self._begin_outage(now, e.ETIMEDOUT, reason, oldest.sent)
            self._probe_at = now + self._longest_pause()
        elif self.state is State.STALLED and now >= self._probe_at and self._parked:
            # What hangs may be one request only: one new request at a time finds out.
            self._probe_at = now + self._longest_pause()
            if len(self._in_flight) < self.limits.in_flight:
                self._send(self._parked.popitem(last=False)[1], now)
        for request in list(self._in_flight.values()):
            if now - request.sent < self._silence:
                break
            if not request.answered:
                self._judge_hanging(request, now)

    def _judge_hanging(self, request: Request, now: float) -> None:
        policy = self.policy.of(request.kind)
        if policy.error is not Action.RETRY or not policy.retry_timeout:
            return  # in an outage all are judged anyway; one slow request alone is waited for
        action = policy.decide(request.kind, e.ETIMEDOUT, now - request.sent)
        if action is Action.RETRY or self.state is State.PAUSED:
            return
        self._io_error(request.kind, e.ETIMEDOUT, action)
        if action is Action.STOP:
            self._stop_by_policy(e.ETIMEDOUT)
        else:
            self._act(request, action, e.ETIMEDOUT)

    def _set_alarm(self, now: float) -> None:
        times = []
        for when in (self._prober.next_try, self._retries.next_time()):
            if when is not None:
                times.append(when)
        timeouts = [
            policy.retry_timeout
            for policy in (self.policy.read, self.policy.write)
            if policy.error is Action.RETRY and policy.retry_timeout
        ]
        if self._outage.since is not None:
            times += [self._outage.since + t for t in timeouts if self._outage.since + t > now]
        if self._in_flight and self.link_up:
            oldest = next(iter(self._in_flight.values()))
            times += [oldest.sent + t for t in timeouts if oldest.sent + t > now]
            if self._outage.since is None:
                times.append(max(self._last_answer, oldest.sent) + self._silence)
            else:
                if self._probe_at <= now:
                    self._probe_at = now + self._longest_pause()
                times.append(self._probe_at)
        if times:
            self._wake_at(min(times))

    # --- states -----------------------------------------------------------------------------

    def _move(self, state: State, reason: str) -> None:
        if state is self.state:
            return
        check_move(self.state, state)
        log.info("%s -> %s%s", self.state, state, f": {reason}" if reason else "")
        self.state = state
        self.since = self.clock()
        self.reason = reason

    @property
    def no_space(self) -> bool:
        """Paused for want of space."""
        return bool(self.paused_by) and self._paused_errno == e.ENOSPC

    @property
    def writes_outstanding(self) -> bool:
        return len(self._writes) > 0

    def fault(self, where: str) -> None:
        """A bug of ours, found outside: see _fault. To be called where it is handled."""
        self._fault(where)

    def _fault(self, where: str) -> None:
        """A bug of ours latches: requests stay parked, never a wrong answer."""
        log.exception("internal error in %s: the disk is faulted and answers nothing", where)
        if self.state not in (State.FAULTED, State.CLOSED):
            self._move(State.FAULTED, f"internal error in {where}; see the log")

    def finish(self) -> None:
        """The end: nothing is sent any more."""
        self._move(State.CLOSED, "umount")
        self.effects.close()

    def status(self) -> dict[str, object]:
        """For `healfs status`: times in seconds."""
        now = self.clock()
        in_flight = sum(not r.answered for r in self._in_flight.values())
        given_up = len(self._in_flight) - in_flight
        parked = sum(not r.answered for r in self._waiting.values())
        parked += len(self._parked) + len(self._retries)
        return {
            "state": str(self.state),
            "state_seconds": round(now - self.since, 3),
            "reason": self.reason or None,
            "size": self.size,
            "requests": {"in_flight": in_flight, "parked": parked, "unsettled": given_up},
            "policy": self.policy.as_dict(),
            "slow_after": self.slow_after,
            "outages": self._outage.as_dict(now),
            "totals": self.totals.as_dict(),
            "limits": {
                "in_flight": {"used": len(self._in_flight), "limit": self.limits.in_flight},
                "failed_retries_per_second": {"limit": self.limits.failed_retries_per_second},
            },
        }
