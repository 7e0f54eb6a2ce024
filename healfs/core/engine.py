# cython: annotation_typing=False
"""The engine: park, send, answer, stall, pause. Plain synchronous code without I/O.

One object owns all state of a disk. Events come in as calls (submit, completed, lost, connected,
wake, ...), effects go out through the small interface Effects. Time comes from the given clock,
chance from the given generator, so the whole engine runs in a simulator.

The parts that can be understood alone are beside it: order (who waits for whom), writelog,
replay, unsettled, retries, prober, outage. What is left is one machine, and longer than a file
should be, because every method touches the same few groups of requests.
"""

from __future__ import annotations

import errno as e
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from healfs.core import errors
from healfs.core.errors import ErrorClass
from healfs.core.order import Order
from healfs.core.outage import AWAY, MISMATCH, SILENT, WORKER, Outage
from healfs.core.policy import Action, Policy
from healfs.core.prober import FIRST_PAUSE, Prober
from healfs.core.queues import Queues
from healfs.core.replay import Replay, Suspects, covers, patch
from healfs.core.request import TAG_MASK, Done, Kind, Phase, Request
from healfs.core.retries import Retries
from healfs.core.ring import Slot
from healfs.core.states import State, check_move
from healfs.core.totals import Totals
from healfs.core.unsettled import Unsettled
from healfs.core.writelog import Attempt, WriteLog, memory_size, visible

log = logging.getLogger("healfs.engine")

_LOOK_EACH, _LARGE = 32, 65536  # writes, bytes: how often it is seen whether the log is half full
ASKED = 4096  # bytes read to find out whether a silent backend answers
LARGEST_BLOCK = 65536  # bytes: the largest minimum block there is (NBD)
EVENT_GAP = 1.0  # seconds between two BLOCK_IO_ERROR events that say the same
READ, WRITE, FLUSH = Kind.READ, Kind.WRITE, Kind.FLUSH
READY, FAULTED = State.READY, State.FAULTED
IN_FLIGHT, PARKED, WAITING, DONE = Phase.IN_FLIGHT, Phase.PARKED, Phase.WAITING, Phase.DONE


class Effects(Protocol):
    """What the engine asks of the world. None of these may call the engine back before it
    returns: a completion inside `send` would nest as deep as the queue is long."""

    def send(self, request: Request, done: Done) -> None:
        """Looked up anew with each connection: it may be the backend's own `submit`."""

    def taken(self, request: Request) -> bool:
        """Did the backend take any of it? Asked after close; what it did not take never lands."""

    def heard(self) -> float:
        """The clock's time at which anything came on this connection, were it a part of an answer
        only; 0: nobody knows."""

    def connect(self) -> None:
        """Try once to reach the backend; ends in `connected` or `connect_failed`."""

    def close(self) -> None:
        """Give up the connection: no completion of it may come any more."""

    def wake_at(self, when: float) -> None:
        """Call `wake` at `when` (the clock's time), or earlier."""

    def event(self, name: str, data: dict[str, object]) -> None: ...
    def probe(self) -> None:
        """Find out whether the backend is away; ends in `probed`."""

    def fence(self) -> None:
        """Make sure that nothing of closed connections lands any more; ends in `fenced`."""


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
        log: WriteLog | None = None,
        *,
        slow_after: float = 5.0,
        settle: float = 0.0,
        fence: bool = False,
        ambiguous: frozenset[int] = frozenset(),
        limits: Limits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.effects = effects
        self._send_to: Callable[[Request, Done], None] = _unconnected  # Effects.send, when it is up
        self._done: Done = self.completed  # bound once
        self.policy = policy
        self.clock = clock
        self.log = _private_log() if log is None else log
        self.frontend: dict[str, Any] = {}  # what the worker wants its successor to know
        self.settle = settle  # seconds; see core/unsettled.py
        self.fence = fence  # Effects.fence decides, not the settle time
        self.ambiguous = ambiguous  # errnos of which only a probe tells what they mean
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
        self._retries = Retries(rng, self.limits.failed_retries_per_second)
        self._queues = Queues(self._retries)
        self._writes = Order()  # those not out of the backend's hands yet
        self._overlays: dict[int, list[tuple[int, bytes]]] = {}  # of reads in flight, by order
        self._unsettled = Unsettled(self.log)
        self._fencing: list[Attempt] | None = None  # what a success of the running fence settles
        self._fence_at: float | None = None
        self._probing = False
        self._probe_covers: frozenset[int] = frozenset()  # the undecided of its beginning, by order
        self._probe_is_stale = False  # it looks at a connection that was lost since
        self._replay = Replay()
        self._replaying = False  # begun, or waiting for what is in flight
        self._was_replaying = False  # the worker before
        self._replay_at: float | None = None  # try again to write what is suspect
        self._replay_pause = 0.0
        self._flush: Request | None = None  # the one flush in flight: the engine's own
        self._beside: set[int] = set()  # it has succeeded, and waits for these FUA writes, by order
        self._pinned: list[Slot] = []  # payloads of attempts on the connection that was lost
        self._accept = ""  # the mismatch that the operator accepts, for one try
        self._drop = False  # and the log is not for that disk
        self._acceptor: Mapping[str, object] = {}
        self._recovered: dict[int, Request] = {}  # an earlier worker's, by tag

        self.link_up = False
        self._ever_connected = False
        self._mismatch = ""
        self.paused_by = ""  # "operator" or "policy" while paused
        self._paused_errno = 0
        self._pause_reason = ""
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
            if self._recovered and self._submit_again(request):
                return
            self._writes.enter(request)
            if request.blockers:
                self._wait(request)
                if self._alarm is None or now + self._silence < self._alarm:
                    self._wake_at(now + self._silence)  # it may be behind one that was given up
                if self._outage.since is not None:
                    self._judge_in_outage(request, now)
                return
        queues = self._queues  # _may_send, at the cost of no call
        if (
            self.state is READY
            and not queues.parked
            and len(queues.in_flight) < self.limits.in_flight
        ):
            self._send(request, now)
            return
        self._park(request)
        if self._outage.since is not None:
            self._judge_in_outage(request, now)

    def _wait(self, request: Request) -> None:
        request.phase = WAITING
        self._queues.waiting[request.order] = request

    def _park_again(self, request: Request) -> None:
        request.phase = PARKED
        self._queues.park_again([request])

    def _may_send(self) -> bool:
        return (
            self.state is State.READY
            and not self._queues.parked
            and len(self._queues.in_flight) < self.limits.in_flight
        )

    def _park(self, request: Request) -> None:
        request.phase = PARKED
        self._queues.parked[request.order] = request
        if self._outage.since is not None and self._outage.oldest is None:
            self._outage.oldest = request.arrived
            self._save()

    def _send(self, request: Request, now: float) -> None:
        kind = request.kind
        if kind is READ:
            if self._replay.suspects.all and self._read_suspects(request):
                return
        elif kind is FLUSH:
            self._send_flush(request, now)
            return
        else:
            # First: what waits for its range needs no room, and takes it from nobody.
            if len(self._unsettled) and self._unsettled.block(request):
                self._wait(request)
                end = self.policy.of(kind).ends(request.arrived)
                self._wake_at(now if self._fence_at is not None else end)
                return
            if request.record < 0 and (self._queues.no_room or not self.log.enter(request)):
                request.phase = PARKED
                self._queues.no_room[request.order] = request
                self.log.move_up()
                self._flush_for_room()
                self._wake_at(now + self._longest_pause())
                return
        request.phase = IN_FLIGHT
        request.sent = now
        request.attempts += 1
        self._queues.in_flight[request.order] = request
        alarm = self._alarm
        if alarm is None or now + self._silence < alarm:
            self._wake_at(now + self._silence)
        self._send_to(request, self._done)

    def _send_flush(self, request: Request, now: float) -> None:
        if not self.can_flush:
            # As QEMU's NBD client does; status says what such a flush is worth.
            self._answer(request, 0, None)
            self._retire(request)
        elif self._replay.latched:
            request.attempts += 1
            self._judge_failed(request, self._replay.errno or e.EIO, now)
        else:
            request.phase = PARKED
            self._queues.flushes[request.order] = request
            self._flush_log()

    def _read_suspects(self, request: Request) -> bool:
        """Serve a read from the log where the backend may not have the bytes; True: all of it."""
        start, end = request.offset, request.offset + request.length
        parts = self._replay.suspects.overlay(start, end)
        if not parts:
            return False
        if not covers(parts, start, end):
            self._overlays[request.order] = parts
            return False
        self._answer(request, 0, patch(bytes(request.length), start, parts))
        self._retire(request)
        return True

    def _send_internal(self, request: Request, now: float) -> None:
        """A request of the engine's own: nobody waits for its answer."""
        self._order = request.order = self._order + 1
        request.internal = request.answered = True
        request.phase = IN_FLIGHT
        request.sent = now
        self._queues.in_flight[request.order] = request
        if self._alarm is None or now + self._silence < self._alarm:
            self._wake_at(now + self._silence)
        self._send_to(request, self._done)

    def _flush_log(self) -> None:
        """Send a flush, for all guests that wait for one, or to make room in the log.

        One at a time: of two that run side by side, the kernel tells only one of an error.
        """
        if self._flush is not None or self._replay.latched:
            return
        if self.state is not State.READY and not self._draining:
            return
        now = self.clock()
        self._queues.covered, self._queues.flushes = self._queues.flushes, {}
        for request in self._queues.covered.values():
            request.phase = IN_FLIGHT
            request.sent = now
            request.attempts += 1
        self._flush = Request(FLUSH, 0, 0, _nobody)
        self._flush.completed = self.log.mark()
        self._send_internal(self._flush, now)

    def _flush_for_room(self) -> None:
        """Not again and again where that frees nothing: a write that hangs may hold the log."""
        if self.log.is_trimmable:
            self._flush_log()

    def _send_parked(self) -> None:
        if self.state is not State.READY:
            return
        now = self.clock()
        if self._queues.no_room:
            self.log.move_up()
        while self._queues.no_room and len(self._queues.in_flight) < self.limits.in_flight:
            request = next(iter(self._queues.no_room.values()))
            if not self.log.enter(request):
                self._flush_for_room()
                break
            del self._queues.no_room[request.order]
            self._send(request, now)
        while (
            self._queues.parked
            and len(self._queues.in_flight) < self.limits.in_flight
            and self.state is State.READY
        ):
            _, request = self._queues.parked.popitem(last=False)
            self._send(request, now)
        if self._queues.flushes:
            self._flush_log()

    def completed(self, request: Request, errno: int, data: object = None) -> None:
        """The backend's answer to a request that was sent on this connection."""
        try:
            if self.state is FAULTED:
                return  # what it means to others is not certain any more
            queues = self._queues
            if queues.in_flight.pop(request.order, None) is not request:
                raise RuntimeError(f"a second completion of {request}")
            self._last_answer = self.clock()
            replaying = self._replaying
            if request.internal:
                self._internal_completed(request, errno)
            elif errno and (not request.answered or errors.is_lost(errno)):
                self._completed_with_error(request, errno)
            else:
                self._completed_well(request, errno, data)
            if self._beside and request.fua:
                self._fua_ended(request)
            if self._outage.since is not None:
                self._answered_again(request, replaying)
            if self._replaying:
                self._pump_replay()
            elif queues.parked or queues.no_room or queues.flushes:
                self._send_parked()
            if self._draining and not queues.in_flight:
                self._drained()
        except Exception:
            self._fault("completed")

    def _completed_well(self, request: Request, errno: int, data: object) -> None:
        """Success; or an error of a request that was given up before."""
        kind = request.kind
        if request.fua:
            if errno:
                self._flush_failed(errno, ())
            elif self._replay.wanted and not request.answered:
                # What failed beside it may have used up the error of this one's bytes.
                failure, now = self._replay.errno or e.EIO, self.clock()
                age = now - (request.first_error or now)
                action = self.policy.of(kind).decide(kind, failure, age)
                if action is not Action.IGNORE or self.state is State.PAUSED:
                    self._judge_failed(request, failure, now)
                    return
                # It is on the disk, and so in the log: else the replay would put older bytes there.
                self._io_error(kind, failure, action)
                self.totals.ignored_bytes += request.length
        if kind is READ:
            if self._overlays and (parts := self._overlays.pop(request.order, None)):
                data = patch(data, request.offset, parts) if not errno else None
        elif not errno:
            if self._replay.suspects.all:
                self._complete_beside_suspects(request)
            else:
                self.log.complete(request)
            if (
                not request.completed % _LOOK_EACH or request.length > _LARGE
            ) and self.log.half_full:
                self.log.move_up()
                self._flush_log()
        if not request.answered:
            self._answer(request, 0, data)
        self._retire(request)

    def _hold(self) -> Callable[[Request], bool] | None:
        return self._replay.suspects.hide if self._replay.suspects.all else None

    def _complete_beside_suspects(self, request: Request) -> None:
        self.log.complete(request, self._replay.suspects.hide)
        if request.kind is Kind.DISCARD:
            return  # a hint: what it covers may still be read
        cut_away = self._replay.suspects.cut(request.offset, request.offset + request.length)
        if cut_away:
            self.log.replayed(cut_away, self._hold())

    def _answer(self, request: Request, errno: int, data: object) -> None:
        if request.answered:
            raise RuntimeError(f"a second answer to {request}")
        request.answered = True
        self.totals.count(request.kind, request.length, errno)
        request.on_answer(request, errno, data)  # type: ignore[arg-type]

    def _retire(self, request: Request) -> None:
        """Out of the backend's hands: whoever waited behind it may go."""
        if request.kind is READ:  # nobody waits for a read
            request.phase = DONE
            return
        if request.waiters is None and request.completed:  # nearly all writes
            request.phase = DONE
            self._writes.leave(request)
            return
        done = [request]
        while done:
            request = done.pop()
            request.phase = DONE
            if request.kind is READ or request.kind is FLUSH:
                continue
            if not request.completed:
                self.log.leave(request)
            for waiter in self._writes.leave(request):
                if self._unblocked(waiter):
                    done.append(waiter)

    def _unblocked(self, request: Request) -> bool:
        """It waits for nobody any more. True: it was answered meanwhile, and is to be retired."""
        del self._queues.waiting[request.order]
        if request.answered:
            return True
        if self._may_send():
            self._send(request, self.clock())
        else:
            self._park(request)
        return False

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
        let_go = request.phase is PARKED
        if let_go:
            self._queues.forget_parked(request)
        elif request.phase is WAITING and self._unsettled.let_go(request):
            let_go = True  # what is behind it may be a read, which waits for no attempt
            del self._queues.waiting[request.order]
        if self._outage.since is not None:
            self._outage.gave_up(self.clock() - request.arrived)
        self._answer(request, errno, data)
        if let_go:
            self._retire(request)

    def fail_all(self, errno: int = e.EIO) -> dict[str, dict[str, int]]:
        """Answer everything with an error; returns what was given up: {kind: {requests, bytes}}."""
        given_up: dict[str, dict[str, int]] = {}
        # The newest first: whoever waits behind another is answered before that one lets it go,
        # and is never sent.
        for request in sorted(self._queues.unanswered(), key=_age, reverse=True):
            entry = given_up.setdefault(request.kind.name.lower(), {"requests": 0, "bytes": 0})
            entry["requests"] += 1
            entry["bytes"] += request.length
            self.totals.failed_by_operator += 1
            self.cancel(request, errno)
        return given_up

    # --- errors and the policy --------------------------------------------------------------

    def _flush_failed(self, errno: int, guests: Iterable[Request]) -> None:
        """Nothing that is not flushed is certain any more: a bare second fsync would lie."""
        self._overlay_reads()
        self.log.lost()
        self._replay.wanted = True
        self._replay.errno = errno
        if self._beside:  # the flush that waits for them has not succeeded, after all
            self._beside.clear()
            self._flush = None
            guests = [*guests, *self._take_flushes()]
        now = self.clock()
        for request in guests:
            if not request.answered:
                self._judge_failed(request, errno, now)
        if self.state is State.READY:
            self._begin_replay()

    def _overlay_reads(self) -> None:
        """Those in flight may find the old bytes of what the backend has just lost."""
        reads = [r for r in self._queues.in_flight.values() if r.kind is READ and not r.answered]
        if not reads:
            return
        lost = Suspects()
        lost.add_visible(self.log.unflushed())
        for request in reads:
            if parts := lost.overlay(request.offset, request.offset + request.length):
                self._overlays[request.order] = parts

    def _take_flushes(self) -> list[Request]:
        """The guests' that wait for the flush that was in flight, and for the next one."""
        queues = self._queues
        taken = [*queues.covered.values(), *queues.flushes.values()]
        queues.covered, queues.flushes = {}, {}
        return taken

    def _completed_with_error(self, request: Request, errno: int) -> None:
        self._overlays.pop(request.order, None)  # sent again, it gets what is right then
        if request.fua and not errors.is_lost(errno):
            # Its own fsync has used up the error of everybody's writes, whatever it makes of it.
            self._flush_failed(errno, ())
        match errors.classify(errno):
            case ErrorClass.REFUSED:
                self._answer(request, errors.for_guest(errno), None)
                self._retire(request)
            case ErrorClass.LOST:
                self._queues.in_flight[request.order] = request  # parked with all the others
                self._lose(errno, f"{os.strerror(errno)}: {errors.reason(errno)}")
            case ErrorClass.FAILED if errno in self.ambiguous:
                request.phase = PARKED
                request.errno = errno
                self._queues.undecided[request.order] = request
                self._probe()
            case ErrorClass.FAILED:
                self._judge_failed(request, errno, self.clock())

    def _probe(self) -> None:
        if not self._probing:  # else what fails now is for the next one
            self._probing = True
            self._probe_covers = frozenset(self._queues.undecided)
            self.effects.probe()

    def probed(self, away: str) -> None:
        """The probe has ended; `away` says why the backend is, "" that it is there."""
        try:
            self._probing = False
            stale, self._probe_is_stale = self._probe_is_stale, False
            if away and self.link_up and not stale:
                self._lose(e.ENODEV, away)
                return
            undecided, now = self._queues.undecided, self.clock()
            for order in [] if stale else sorted(self._probe_covers):
                if (request := undecided.pop(order, None)) is not None:
                    self._judge_failed(request, request.errno, now)
            if undecided:
                self._probe()
        except Exception:
            self._fault("probed")

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
            self._park_again(request)
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
        if self.state is State.REPLAYING:
            if not self._replay_is_held:
                return
        elif self.state not in (State.STALLED, State.CONNECTING, State.MISMATCH):
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
        for request in sorted(self._queues.unanswered(), key=_age):
            self._judge_in_outage(request, now)

    @property
    def _replay_is_held(self) -> bool:
        """It waits for a range that is not settled, perhaps for ever, and all wait for it."""
        return bool(self._replay.running and not self._queues.in_flight and len(self._unsettled))

    def _judge_unsettled(self, now: float) -> None:
        """Writes that wait for a range that is not settled do so under their policy's clock, and
        where the fence fails under any policy."""
        fails = self._fence_at is not None
        for request in [r for attempt in self._unsettled for r in attempt.waiters or ()]:
            if request.answered or self.state is not State.READY:
                continue
            # Else the settle time comes; that is no error to be reported.
            if fails or self.policy.of(request.kind).times_out:
                self._judge_waiting(request, e.ETIMEDOUT, now, request.arrived)

    def _judge_waiting(self, request: Request, errno: int, now: float, since: float) -> None:
        """Decide on one that waits, with the connection up."""
        action = self.policy.of(request.kind).decide(request.kind, errno, now - since)
        if action is Action.RETRY or self.state is State.PAUSED:
            return
        self._io_error(request.kind, errno, action)
        if action is Action.STOP:
            self._stop_by_policy(errno)
        else:
            self._act(request, action, errno)

    def set_policy(self, policy: Policy) -> None:
        """A new policy, in force at once: it acts on what is parked, too."""
        try:
            self.policy = policy
            self._save()
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

    def pause(self, who: Mapping[str, object] | None = None) -> None:
        """QMP stop: answers at once; HEALFS_DRAINED tells when nothing is in flight any more and
        what was answered is flushed, or cannot be. `who` asks for it, as the event STOP says it.
        """
        try:
            if self.paused_by != "operator":
                self._pause_disk("operator", "stop", who)
        except Exception:
            self._fault("pause")

    def _pause_disk(self, by: str, reason: str, who: Mapping[str, object] | None = None) -> None:
        away = self.reason if self._outage.since is not None else ""
        self._move(State.PAUSED, reason)
        self._pause_reason = reason
        self.reason = away or reason  # `pause` says by whom; why the backend is away, nothing else
        self.paused_by = by
        self._stop_replay()
        self._save()
        self.effects.event("STOP", {"by": by, "reason": reason, **(who or {})})
        self._draining = True
        if not self._queues.in_flight:
            self._drained()

    def _drained(self) -> None:
        """Nothing is in flight any more; flush, where the operator wants to touch the backend."""
        if self.paused_by == "operator" and self.link_up:
            if self.log.has_unflushed() or self._queues.flushes:
                self._flush_log()
            if self._flush is not None:
                return  # this is called again when it is answered
        self._draining = False
        self._save()
        self.effects.event("HEALFS_DRAINED", {"unflushed": len(self.log.unflushed())})

    def resume(self, who: Mapping[str, object] | None = None) -> None:
        """QMP cont."""
        try:
            if self.state is State.PAUSED:
                self._resume(self.clock(), who)
        except Exception:
            self._fault("resume")

    def _resume(self, now: float, who: Mapping[str, object] | None = None) -> None:
        self.paused_by, self._paused_errno = "", 0
        self._draining = False
        self.effects.event("RESUME", dict(who or {}))
        self._wake_at(now)  # for what was not looked at while paused
        self._save()
        if self._mismatch:
            self._move(State.MISMATCH, self._mismatch)
        elif self.link_up:
            self._go_on(now)
        elif not self._ever_connected:
            self._move(State.CONNECTING, "cont")
        else:
            self._move(State.STALLED, os.strerror(self._outage.errno))
        if not self.link_up and not self._prober.trying:
            self._connect_now()  # the policy is asked again when this try has failed

    # --- the backend comes and goes ---------------------------------------------------------

    def start(self) -> None:
        """Begin to connect, with the disk's size known beforehand (mount --no-wait)."""
        if not self._ever_connected:
            self.align = LARGEST_BLOCK  # what comes before the first connection is ordered by it
        self._connect_now()
        self._set_alarm(self.clock())  # the outage's clock runs

    def _connect_now(self) -> None:
        self._prober.begin()
        self.effects.connect()

    def try_now(self) -> None:
        """Something changed outside: a try now may succeed (the socket file appeared)."""
        if self._prober.hint():
            self._connect_now()

    def connected(
        self,
        size: int,
        *,
        align: int = 1,
        can_flush: bool = True,
        volatile_cache: bool = True,
        mismatch: str = "",
    ) -> None:
        """The backend is there. `mismatch` says why it is not the disk it was ("": it is)."""
        try:
            if self.state is State.CLOSED:
                return
            now = self.clock()
            if not self.size:
                self.size = size
            elif size < self.size:
                mismatch = mismatch or f"it has {size} bytes, the disk {self.size}"
            # What waits is ordered by smaller blocks: two writes into one of these would be two
            # read, modify, writes of it side by side.
            coarser = self._ever_connected and align > self.align
            if coarser:
                mismatch = mismatch or f"its minimum block is {align} bytes, was {self.align}"
            fits = size >= self.size and not coarser
            accepted = mismatch != "" and mismatch == self._accept and fits
            self._accept = ""
            if mismatch and not accepted:
                self._connected_to_another(mismatch)
                return
            if accepted:
                writes = len(self.log.unflushed())
                done = {"log": "dropped" if self._drop else "replayed", "unflushed": writes}
                self.effects.event("HEALFS_ACCEPTED", {**self._acceptor, **done})
            if accepted and self._drop:
                self.log.lost()
                self._replay = Replay()
                self.log.replayed(self.log.unflushed())
            self._mismatch = ""
            self.align = max(self.align, align) if self._ever_connected else align
            self.can_flush = can_flush
            # What is there to be replayed has newer writes over it, which must stay as long.
            self.log.keep = can_flush and (volatile_cache or self.log.has_unflushed())
            self.log.ring.unpin(self._pinned)  # connect() has waited for what hung
            self._pinned = []
            self.link_up = True
            self._send_to = self.effects.send
            self._last_answer = now
            self._prober.up(now)
            if self._ever_connected:
                self.totals.reconnects += 1
            self._ever_connected = True
            self._save()
            if self.state is not State.PAUSED:
                self._go_on(now)
            else:
                self.reason = self._pause_reason  # no more why the backend is away
        except Exception:
            self._fault("connected")

    def _go_on(self, now: float) -> None:
        """The backend is there and nobody has paused the disk: replay first, then the rest."""
        if self._replay.wanted:
            self._replay.wanted = self.log.has_unflushed()
        if self._replay.latched:
            self._begin_replay()
        else:
            self._ready(now)

    def _ready(self, now: float) -> None:
        self._move(State.READY, "")
        if not any(True for _ in self._queues.unanswered()):
            self._end_outage(now)
        self._send_parked()

    def accept(self, *, replay: bool, who: Mapping[str, object] | None = None) -> None:
        """The operator accepts the other disk: write the log to it, or throw the log away.

        `who` asks for it, as the event HEALFS_ACCEPTED says it.
        """
        try:
            self._acceptor = who or {}
            self._drop = not replay
            self._accept = self._mismatch  # this one, and no third one
            self._connect_now()
        except Exception:
            self._fault("accept")

    def _connected_to_another(self, mismatch: str) -> None:
        if mismatch != self._mismatch:
            self._mismatch = mismatch
            self._outage_changed(MISMATCH, mismatch)
            self.effects.event("HEALFS_MISMATCH", {"reason": mismatch})
        self._close()
        if self.state is not State.PAUSED:
            self._move(State.MISMATCH, mismatch)
        again = self.clock() + self._longest_pause()  # the right one may come back
        self._prober.later(again)
        self._wake_at(again)

    def connect_failed(self, errno: int, reason: str = "") -> None:
        """The try did not succeed; the next one comes after a pause."""
        try:
            if self.state is State.CLOSED:
                return
            now = self.clock()
            self._accept = ""
            self._outage.errno = errno = errno or e.ETIMEDOUT
            self.reason = reason or os.strerror(errno)
            self._mismatch = ""
            self._outage_changed(AWAY, self.reason)
            if self.state is State.MISMATCH:
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
        self._probe_is_stale = self._probing
        log.info(
            "lost with %d in flight, %d entries in the log",
            len(self._queues.in_flight),
            len(self.log),
        )
        self._begin_outage(now, errno, AWAY, reason, now)
        lacking = self._replay.lacking
        self._stop_replay()
        self._flush = None
        self._beside.clear()
        self._overlays.clear()
        self.log.lost()
        self._replay.wanted = True
        flying = self._queues.take_flying()
        self._close()
        self._remember_attempts(
            (
                (r.origin.order if r.origin else r.order, r.start, r.end, lacking and _is_part(r))
                for r in flying.values()
                if r.kind is not READ and r.kind is not FLUSH and self.effects.taken(r)
            ),
            now,
        )
        for request in flying.values():
            owner = request.origin.owner if request.origin else request.owner
            if owner is not None and not owner.pinned:
                owner.pinned = True
                self._pinned.append(owner)
        again = []
        for request in flying.values():
            if request.internal:
                request.phase = DONE
            elif request.answered:
                self._retire(request)
            else:
                again.append(request)
        again += self._queues.take_held_up(now)
        for request in again:
            request.phase = PARKED
        self._queues.park_again(again)
        self.totals.retries += len(again)
        if self._draining:
            self._drained()
        self._prober.down(now, self._longest_pause())
        if self._prober.next_try == now:
            self._connect_now()
        self._judge_all_in_outage(now)
        self._set_alarm(now)  # a try may last longer than a timeout

    def _remember_attempts(self, sent: Iterable[tuple[int, int, int, bool]], now: float) -> None:
        """What the backend took of writes (order, start, end, foreign) may land as long as it is
        unsettled (promise 4)."""
        if not self.settle and not self.fence:
            return
        for order, start, end, foreign in sent:
            self._unsettled.add(order, start, end, self._until(now), foreign=foreign)
        if self.fence and len(self._unsettled):
            self._start_fence()
        elif (when := self._unsettled.next_time()) is not None:
            self._wake_at(when)

    def _until(self, now: float) -> float:
        return math.inf if self.fence else now + self.settle

    def _start_fence(self) -> None:
        if self._fencing is None:
            self._fence_at = None
            self._fencing = list(self._unsettled)
            self.effects.fence()

    def fenced(self, error: str = "") -> None:
        """The fence has ended; `error` says why it did not succeed: then the ranges wait on."""
        try:
            now = self.clock()
            covered, self._fencing = self._fencing or [], None
            if error:
                self.effects.event("HEALFS_FENCE_FAILED", {"reason": error})
                self._fence_at = now + self._longest_pause()
                self._judge_unsettled(now)
                self._set_alarm(now)
                return
            self._settled(self._unsettled.settle_all(covered))
            if len(self._unsettled):
                self._start_fence()  # attempts of a connection lost meanwhile
        except Exception:
            self._fault("fenced")

    def _settled(self, free: list[Request]) -> None:
        for request in free:
            if self._unblocked(request):
                self._retire(request)
        if self._replaying:
            self._pump_replay()

    def reconnect(self) -> None:
        """The operator gives up a connection that hangs."""
        if self.link_up:
            self.lost(e.ETIMEDOUT, "the connection was given up by the operator")
        else:
            self.try_now()

    def _begin_outage(self, now: float, errno: int, kind: str, reason: str, since: float) -> None:
        oldest = next(self._queues.unanswered(), None)
        if self._outage.begin(since, errno, sum(self.totals.requests)):
            arrivals = (request.arrived for request in self._queues.unanswered())
            self._outage.oldest = min(arrivals, default=None)
            self._outage.kind = kind
            self._save()
            failed = oldest.kind if oldest else WRITE
            action = self.policy.of(failed).decide(failed, errno, now - since)
            self._told.clear()  # each outage is told, however soon after the last
            self.effects.event("HEALFS_OUTAGE", {"kind": kind, "reason": reason})
            self._io_error(failed, errno, action)
        elif kind != WORKER:  # else it is still what it was before the worker died
            self._outage_changed(kind, reason)
        if self.state in (State.READY, State.REPLAYING):
            self._move(State.STALLED, reason)
        self.reason = reason

    def _outage_changed(self, kind: str, reason: str) -> None:
        if self._outage.change(kind):
            self._save()
            if kind != MISMATCH:  # which has an event of its own
                self.effects.event("HEALFS_OUTAGE_CHANGED", {"kind": kind, "reason": reason})

    def _answered_again(self, request: Request, replaying: bool) -> None:
        """An answer came: the end of a hang, and, to a guest, of an outage."""
        if not self.link_up:
            return
        if self.state is State.STALLED:
            self._move(State.REPLAYING if self._replaying else State.READY, "")
            if self._replay.wanted and not self._replaying:
                self._begin_replay()  # a flush failed in the silence
        of_replay = replaying and request.internal  # then no guest has an answer yet
        if self.state is State.READY and not of_replay:
            self._end_outage(self.clock(), request)

    def _end_outage(self, now: float, last: Request | None = None) -> None:
        """`last` is the request whose answer ends it."""
        if self._outage.since is None:
            return
        answered = sum(self.totals.requests)
        for request in self._queues.unanswered():
            answered += 1
            self._outage.waited(now - request.arrived)
        if last is not None and not last.internal:
            self._outage.waited(now - last.arrived)
        told = self._outage.end(now, answered)
        self._save()
        if told is not None:
            self.effects.event("HEALFS_RECOVERED", told)

    # --- the replay -------------------------------------------------------------------------

    def _begin_replay(self) -> None:
        self._replay_at = None
        self._replaying = True
        self._save()
        self._move(State.REPLAYING, os.strerror(self._replay.errno) if self._replay.errno else "")
        self._pump_replay()

    def _stop_replay(self) -> None:
        if self._replaying:
            self._replaying = False
            self._replay.stop()
            if self._replay.wanted:  # else it had not begun, and the next flush is as good as ever
                self.log.lost()

    def _pump_replay(self) -> None:
        if self.state is not State.REPLAYING:
            return
        replay, now = self._replay, self.clock()
        if not replay.running:
            if self._queues.in_flight:
                return  # it wants the disk for itself
            if replay.wanted:
                self.log.lost()  # what completed since is part of it, and may be refused
            replay.begin(self.log.unflushed())
        while len(self._queues.in_flight) < self.limits.in_flight:
            piece = replay.next(self.align, self._unsettled, _nobody)
            if piece is None:
                break
            self._send_internal(piece, now)
        if self._outage.since is not None and self._replay_is_held:
            self._judge_all_in_outage(now)
            self._set_alarm(now)
            if not self._replaying:
                return  # the policy has paused the disk
        if replay.done and not replay.flushing:
            replay.flushing = True
            self._flush = Request(FLUSH, 0, 0, _nobody)
            self._flush.completed = self.log.mark()
            self._send_internal(self._flush, now)

    def _internal_completed(self, request: Request, errno: int) -> None:
        request.phase = DONE
        if errno in self.ambiguous:
            self._probe()  # what it says comes too late for this one, but not for the next
        if errors.is_lost(errno):
            self._queues.in_flight[request.order] = request
            self._lose(errno, f"{os.strerror(errno)}: {errors.reason(errno)}")
        elif request.kind is READ:
            pass  # of _ask: there was an answer
        elif request.kind is FLUSH:
            self._flushed(request, errno)
        elif errno:
            self._replay.refused(request, errno)
        else:
            self._replay.written(request)

    def _flushed(self, flush: Request, errno: int) -> None:
        if not errno and not self._replay.wanted:
            # One that goes on beside it may have used up the error that this flush should have
            # told of, and be answered later: until then the flush proves nothing.
            self._beside = {order for order, r in self._queues.in_flight.items() if r.fua}
            if self._beside:
                return
        self._flush_ended(flush, errno)

    def _fua_ended(self, request: Request) -> None:
        """The flush waits for it, and perhaps for others; for none that was sent since."""
        self._beside.discard(request.order)
        if not self._beside and self._flush is not None:
            self._flush_ended(self._flush, 0)

    def _flush_ended(self, flush: Request, errno: int) -> None:
        self._flush = None
        if self._replaying and self._replay.flushing:
            self._replay_flushed(flush, errno)
        elif errno or self._replay.wanted:
            self._flush_failed(errno or self._replay.errno or e.EIO, self._take_flushes())
        else:
            guests, self._queues.covered = self._queues.covered, {}
            self.log.trim(flush.completed, self._hold())
            for request in guests.values():
                if not request.answered:
                    if self._outage.since is not None:
                        self._outage.waited(self.clock() - request.arrived)
                    self._answer(request, 0, None)
                request.phase = DONE
            if self._queues.flushes:
                self._flush_log()

    def _replay_flushed(self, request: Request, errno: int) -> None:
        now = self.clock()
        self._replaying = False
        self._save()
        if errno:
            self.log.lost()
            self._replay.failed(errno, self.log.unflushed())
        else:
            stable = self._replay.succeeded()
            self.log.replayed(stable, self._hold(), request.completed)
        if self._replay.latched:
            action = self.policy.write.decide(FLUSH, self._replay.errno, 0.0)
            self._io_error(WRITE, self._replay.errno, action)
            self._replay_pause = min(self._longest_pause(), self._replay_pause * 2 or FIRST_PAUSE)
            self._replay_at = now + self._replay_pause
            self._wake_at(self._replay_at)
        else:
            self._replay_pause = 0.0
        self._ready(now)

    # --- the take-over ----------------------------------------------------------------------

    def take_over(self, since: float | None = None) -> None:
        """Go on where an earlier worker ended (promise 10): call it before anything else.

        It answered until `since`, the clock's time (None: until now).
        Then submit what the kernel sends again (see request.oldest_first), then call `resent`,
        then `start`.
        """
        found, attempts = self.log.recover(_nobody)
        self.log.ring.shut()  # what was in flight there may go on until there is a connection
        saved: Any = self.log.saved() or {}
        self._load(saved)
        now = self.clock()
        self.state = State.STALLED if self._ever_connected else State.CONNECTING
        self._replay.wanted = True
        for attempt in attempts:
            attempt.until = self._until(now)
            self._unsettled.restore(attempt)
            self._order = max(self._order, attempt.order)
        for entry in found:
            entry.start -= entry.start % self.align
            entry.end += -entry.end % self.align
            entry.answered = True
            self._order = max(self._order, entry.order)
            self._recovered[entry.tag & TAG_MASK] = entry
        sent = [(r.order, r.start, r.end, _is_part(r)) for r in found if not r.completed]
        self._was_replaying = saved.get("replaying", False)
        if self._was_replaying:  # it sends completed ones again: these pieces, or some of them
            align = self.align
            for entry, start, end in visible(entry for entry in found if entry.completed):
                part = bool(start % align or end % align)
                sent.append((entry.order, start - start % align, end + -end % align, part))
        self._remember_attempts(sent, now)
        reason = "the worker has ended, another one took over"
        self._begin_outage(now, e.ESHUTDOWN, WORKER, reason, now if since is None else since)
        if self.paused_by:
            self.state = State.PAUSED
            self.since = saved.get("paused_since", now)
            self._pause_reason = saved.get("pause_reason", "stop")

    def hold(self) -> None:
        """Send nothing more, but for a flush that is waited for: a successor goes on."""
        self.limits = replace(self.limits, in_flight=0)

    @property
    def in_flight(self) -> int:
        """Requests that the backend has."""
        return len(self._queues.in_flight)

    def _submit_again(self, request: Request) -> bool:
        """A request that the kernel sends again; True: it was done already.

        Its bytes may have changed since: what counts is what may be on the disk already, so it
        is answered for, or sent with, the bytes of the first time.
        """
        if (
            request.kind is READ
            or (entry := self._recovered.pop(request.tag & TAG_MASK, None)) is None
        ):
            return False
        self.log.release(request)
        if entry.completed:
            self._answer(request, 0, None)
            request.phase = DONE
            return True
        self.log.replace(entry, request)
        return False

    def resent(self) -> None:
        """All that the kernel sends again was submitted; what did not come, nobody waits for."""
        for entry in self._recovered.values():
            if not entry.completed:
                self.log.leave(entry)
        self._recovered = {}

    def save(self, **frontend: object) -> None:
        """Keep what a successor has to know, with these of the frontend's own."""
        self.frontend |= frontend
        self._save()

    def _save(self) -> None:
        self.log.save(
            {
                "policy": self.policy.as_dict(),
                "paused_by": self.paused_by,
                "paused_since": self.since,
                "paused_errno": self._paused_errno,
                "pause_reason": self._pause_reason,
                "size": self.size,
                "align": self.align,
                "outage": self._outage.save(),
                "frontend": self.frontend,
                "ever_connected": self._ever_connected,
                "replaying": self._may_be_replaying(),
            }
        )

    def _may_be_replaying(self) -> bool:
        """Whether pieces of a replay may land: those of one that was paused, too, until they are
        answered, and those of the worker before, until they are settled."""
        if self._replaying or (self._was_replaying and len(self._unsettled)):
            return True
        return any(request.origin is not None for request in self._queues.in_flight.values())

    def _load(self, saved: Any) -> None:
        if not saved:
            return
        self.policy = Policy.from_dict(saved["policy"])
        self.paused_by = saved["paused_by"]
        self._paused_errno = saved.get("paused_errno", 0)
        self.size, self.align = saved["size"], saved["align"]
        self._outage.load(saved["outage"])
        self._ever_connected = saved["ever_connected"]
        self.frontend = saved["frontend"]

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
            if self._replay_at is not None and now >= self._replay_at:
                self._replay_at = None
                if self.state is State.READY and self._replay.latched:
                    self._begin_replay()
                elif self.state is State.STALLED and self.link_up:  # by silence
                    self._replay_at = now + self._longest_pause()
            if self._fence_at is not None and now >= self._fence_at:
                self._start_fence()
            if len(self._unsettled):
                self._settled(self._unsettled.settle(now))
                self._judge_unsettled(now)
            self._retry_failed(now)
            self._judge_without_room(now)
            if self._queues.no_room:
                self._send_parked()
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
            if self.state is State.READY and len(self._queues.in_flight) < self.limits.in_flight:
                self._send(request, now)
            else:
                self._park_again(request)

    def _look_for_silence(self, now: float) -> None:
        """No answer at all is an outage, too; one request may hang while others are answered."""
        if not self.link_up:
            return
        # An answer that is long, over a link that is slow, is no silence while it comes.
        self._last_answer = max(self._last_answer, self.effects.heard())
        waited_since = self._waited_since()
        if self.state is State.STALLED:
            # Nothing may overtake the replay.
            if now >= self._probe_at and not self._replaying:
                self._probe_at = now + self._longest_pause()
                self._ask(now)
        elif waited_since is not None and self.state in (State.READY, State.REPLAYING):
            silent_since = max(self._last_answer, waited_since)
            if now >= silent_since + self._silence:
                reason = f"no answer for {self.slow_after:g} s"
                self._begin_outage(now, e.ETIMEDOUT, SILENT, reason, silent_since)
                self._probe_at = now + self._longest_pause()
        for request in [*self._queues.covered.values(), *self._queues.in_flight.values()]:
            if now - request.sent >= self._silence and not request.answered:
                self._judge_hanging(request, now, request.sent)
        for request, since in self._behind_hanging(now):
            self._judge_hanging(request, now, since)

    def _waited_since(self) -> float | None:
        """Since when somebody waits for what is in flight. For most of what was given up nobody
        does."""
        queues, times = self._queues, []
        for request in queues.in_flight.values():
            if request.internal or not request.answered:
                times.append(request.sent)
                break
            if request.order in self._beside and self._flush is not None:
                times.append(self._flush.sent)
            times += [r.arrived for r in request.waiters or () if not r.answered]
        else:
            if queues.in_flight and self._replaying and not self._replay.running:
                times.append(self.since)
            if queues.parked and len(queues.in_flight) >= self.limits.in_flight > 0:
                times.append(next(iter(queues.parked.values())).arrived)
        return min(times, default=None)

    def _behind_hanging(self, now: float) -> list[tuple[Request, float]]:
        """What waits for one that hangs, given up or not, for others, too; and since when."""
        found: dict[int, tuple[Request, float]] = {}
        if (flush := self._flush) is not None and now - flush.sent >= self._silence:
            for request in self._queues.flushes.values():  # for the next one
                found[request.order] = request, max(request.arrived, flush.sent)
        for hanging in self._queues.in_flight.values():
            if hanging.waiters is None or now - hanging.sent < self._silence:
                continue
            behind = list(hanging.waiters)
            for request in behind:
                if request.order not in found:
                    found[request.order] = request, max(request.arrived, hanging.sent)
                    behind += request.waiters or ()
        return [entry for entry in found.values() if not entry[0].answered]

    def _ask(self, now: float) -> None:
        """What hangs may be one request only: one new request at a time finds out. Where the policy
        has answered all, it is a READ of the engine's own."""
        if len(self._queues.in_flight) >= self.limits.in_flight:
            return
        if self._queues.parked:
            self._send(self._queues.parked.popitem(last=False)[1], now)
        else:
            length = min(self.size, max(self.align, ASKED))
            self._send_internal(Request(READ, 0, length, _nobody), now)

    def _judge_without_room(self, now: float) -> None:
        """Writes that wait for room in the log do so under their policy's clock."""
        if not self._queues.no_room:
            return
        fails = self._refused_fills_the_log()
        errno = self._replay.errno if fails else e.ETIMEDOUT
        for request in list(self._queues.no_room.values()):
            if self.state is not State.READY:
                return
            # Else room comes with the next flush; that is no error to be reported.
            if fails or self.policy.of(request.kind).times_out:
                self._judge_waiting(request, errno, now, request.arrived)

    def _refused_fills_the_log(self) -> bool:
        """No flush makes room any more, nor does an answer: the backend has refused it all."""
        if not self._replay.errno or not self._replay.latched or self.log.is_trimmable:
            return False
        return all(request.kind is READ for request in self._queues.in_flight.values())

    def _judge_hanging(self, request: Request, now: float, since: float) -> None:
        # In an outage all are judged anyway; one slow request alone is waited for.
        if self.policy.of(request.kind).times_out:
            self._judge_waiting(request, e.ETIMEDOUT, now, since)

    def _set_alarm(self, now: float) -> None:
        times = []
        for when in (
            self._prober.next_try,
            self._retries.next_time(),
            self._replay_at,
            self._fence_at,
            self._unsettled.next_time() if len(self._unsettled) else None,
        ):
            if when is not None:
                times.append(when)
        times_out = self.policy.read.times_out or self.policy.write.times_out
        began = []  # what a policy's clock runs for, since
        if self._queues.no_room:
            began.append(next(iter(self._queues.no_room.values())).arrived)
            times.append(now + self._longest_pause())
        for attempt in self._unsettled if times_out else ():
            began += [request.arrived for request in attempt.waiters or ()]
        if self._outage.since is not None:
            began.append(self._outage.since)
        if self.link_up and self.state is State.STALLED:
            if self._probe_at <= now:
                self._probe_at = now + self._longest_pause()
            times.append(self._probe_at)
        if times_out:
            began += [since for _, since in self._behind_hanging(now)]
        waited_since = self._waited_since() if self.link_up else None
        if waited_since is not None:
            began.append(waited_since)
            if self.state in (State.READY, State.REPLAYING):
                times.append(max(self._last_answer, waited_since) + self._silence)
        for since in began if times_out else ():
            ends = self.policy.read.ends(since), self.policy.write.ends(since)
            times += [end for end in ends if now < end < math.inf]
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

    @property
    def latched(self) -> bool:
        """Some answered bytes are in the log only, and no flush succeeds."""
        return self._replay.latched

    @property
    def outage_seconds(self) -> float:
        """How long the outage has lasted that there is now; 0: there is none."""
        return self._outage.age(self.clock()) if self._outage.count else 0.0

    @property
    def longest_in_flight(self) -> float:
        """Seconds since the oldest request in flight was sent; 0: none is."""
        oldest = next(iter(self._queues.in_flight.values()), None)
        return 0.0 if oldest is None else self.clock() - oldest.sent

    def fault(self, where: str) -> None:
        """A bug of ours, found outside: see _fault. To be called where it is handled."""
        self._fault(where)

    def _fault(self, where: str) -> None:
        """A bug of ours latches: requests stay parked, never a wrong answer."""
        log.exception("internal error in %s: the disk is faulted and answers nothing", where)
        if self.state not in (State.FAULTED, State.CLOSED):
            reason = f"internal error in {where}; see the log"
            self._move(State.FAULTED, reason)
            self.effects.event("HEALFS_FAULTED", {"reason": reason})

    def _close(self) -> None:
        self._send_to = _unconnected  # else it keeps what the connection had in memory
        self.effects.close()

    def finish(self) -> None:
        """The end: nothing is sent any more."""
        self._move(State.CLOSED, "umount")
        self._close()

    def _pause_status(self) -> dict[str, object] | None:
        if self.state is not State.PAUSED:
            return None
        stage = "held" if not self._draining else "flushing" if self._flush else "draining"
        unflushed = len(self.log.unflushed())
        silent = self._outage.since is not None and self._outage.kind == SILENT
        away = not self.link_up or silent
        return {"by": self.paused_by, "stage": stage, "unflushed": unflushed, "away": away}

    def status(self) -> dict[str, object]:
        """For `healfs status`: times in seconds."""
        now = self.clock()
        in_flight, parked, given_up = self._queues.counts()
        unsettled = len(self._unsettled) + given_up
        return {
            "state": str(self.state),
            "state_seconds": round(now - self.since, 3),
            "reason": self.reason or None,
            "pause": self._pause_status(),
            "size": self.size,
            "requests": {
                "in_flight": in_flight,
                "parked": parked,
                "unsettled": unsettled,
            },
            "retrying": self._retrying(now),
            "policy": self.policy.as_dict(),
            "slow_after": self.slow_after,
            "settle": self.settle,
            "fence": self.fence,
            "write_log": self.log.as_dict(),
            "outages": self._outage.as_dict(now),
            "totals": self.totals.as_dict(),
            "limits": {
                "in_flight": {"used": len(self._queues.in_flight), "limit": self.limits.in_flight},
                "failed_retries_per_second": {"limit": self.limits.failed_retries_per_second},
            },
        }

    def _retrying(self, now: float) -> dict[str, object] | None:
        """Of requests that failed, and wait for their next try or are in it. The disk is ready."""
        tried = (*self._retries, *self._queues.in_flight.values())
        failed = [request for request in tried if request.first_error and not request.answered]
        if not failed:
            return None
        oldest = min(failed, key=_first_error)
        return {
            "requests": len(failed),
            "seconds": round(now - oldest.first_error, 3),
            "reason": os.strerror(oldest.errno),
        }


def _age(request: Request) -> int:
    return request.order


def _first_error(request: Request) -> float:
    return request.first_error


def _is_part(request: Request) -> bool:
    """Of a block at either end."""
    return request.start < request.offset or request.end > request.offset + request.length


def _unconnected(request: Request, done: Done) -> None:
    raise RuntimeError(f"{request} was sent without a connection")


def _nobody(request: Request, errno: int, data: object) -> None:
    """Nobody waits for the engine's own requests."""


def _private_log() -> WriteLog:
    """A log in ordinary memory: it does not outlive the process."""
    memory = bytearray(memory_size(4 << 20, 2048))
    return WriteLog(memoryview(memory), 2048, 1 << 20)
