"""A scripted world for the engine: a test says what comes in and what must go out, in order.

Requests have names. `expect` holds what left the engine since the last call against the lines
given: "send a", "answer a" (or "answer a EIO"), "connect", "close", "event STOP". Time is a number
that only `run` moves. Only the engine's public interface is touched.
"""

from __future__ import annotations

import errno as e
import inspect
import random
import zlib
from collections.abc import Callable
from typing import Any

from healfs.core.engine import Engine, Limits
from healfs.core.policy import Action, DirectionPolicy, Policy
from healfs.core.request import Done, Kind, Phase, Request
from healfs.core.ring import PayloadRing, Slot
from healfs.core.writelog import WriteLog, memory_size

BLOCK = 4096
SIZE = 1 << 20
START = 1000.0
LOG_BYTES, LOG_ENTRIES, MESSAGE = 4 << 20, 2048, 1 << 20

# What the write log adds is switched off here: order and policy are the same with and without it.
_CONNECTED = inspect.signature(Engine.connected).parameters
_ENGINE = inspect.signature(Engine.__init__).parameters
STABLE: dict[str, Any] = {"volatile_cache": False} if "volatile_cache" in _CONNECTED else {}
FENCED: dict[str, Any] = {"settle": 0.0} if "settle" in _ENGINE else {}


def retry(timeout: float = 0.0, then: str = "report", interval: float = 1.0) -> DirectionPolicy:
    return DirectionPolicy(Action.RETRY, interval, timeout, Action(then))


def policy(
    both: DirectionPolicy | str | None = None,
    *,
    read: DirectionPolicy | str | None = None,
    write: DirectionPolicy | str | None = None,
) -> Policy:
    """A direction is a DirectionPolicy or the name of an action; None: retry for ever."""

    def direction(value: DirectionPolicy | str | None) -> DirectionPolicy:
        value = value or both or retry()
        return DirectionPolicy(Action(value)) if isinstance(value, str) else value

    return Policy(direction(read), direction(write))


_names: dict[int, str] = {}  # by tag, which is a number


def _tag_of(name: str) -> int:
    number = zlib.crc32(name.encode())
    _names[number] = name
    return number


def _name_of(request: Request) -> str:
    return _names.get(request.tag, str(request.tag))


class _WatchedRing(PayloadRing):
    """Notes whose payload is released."""

    def __init__(self, memory: memoryview, released: list[str]) -> None:
        super().__init__(memory, MESSAGE)
        self.released = released

    def release(self, slot: Slot) -> None:
        assert isinstance(slot.request, Request)
        self.released.append(_name_of(slot.request))
        super().release(slot)


class Playbook:
    """The world as Effects sees it, and the hand that plays it."""

    def __init__(
        self,
        given: Policy | None = None,
        *,
        slow_after: float = 5.0,
        limits: Limits | None = None,
        size: int = SIZE,
        up: bool = True,
    ) -> None:
        self.now = START
        self.log: list[str] = []
        self.answers: dict[str, tuple[int, bytes | None]] = {}
        self.events: list[tuple[str, dict[str, object]]] = []
        self.released: list[str] = []
        self.connects: list[float] = []
        self.sends: list[tuple[float, str]] = []
        self.on_send: Callable[[Request], None] | None = None
        self._requests: dict[str, Request] = {}
        self._flush: Request
        self._alarms: list[float] = []
        self.heard_at = 0.0
        memory = memoryview(bytearray(memory_size(LOG_BYTES, LOG_ENTRIES)))
        log = WriteLog(memory, LOG_ENTRIES, MESSAGE)
        log.ring = _WatchedRing(memory[-LOG_BYTES:], self.released)
        self.engine = Engine(
            self,
            given or policy(),
            lambda: self.now,
            log,
            slow_after=slow_after,
            limits=limits,
            rng=random.Random(1),
            **FENCED,
        )
        if up:
            self.engine.start()
            self.up(size)
            self.expect("connect")

    # --- Effects ---------------------------------------------------------------------------

    def send(self, request: Request, done: Done) -> None:
        for name in self._names(request):
            self._say(f"send {name}")
            self.sends.append((self.now, name))
        if self.on_send:
            self.on_send(request)

    def taken(self, request: Request) -> bool:
        return True

    def _names(self, request: Request) -> list[str]:
        """A flush is the engine's own, and stands for the guests' that it will answer."""
        if not (request.internal and request.kind is Kind.FLUSH):
            return [_name_of(request)]
        self._flush = request
        guests = (r for r in self._requests.values() if r.kind is Kind.FLUSH and not r.answered)
        return [_name_of(r) for r in guests if r.phase is Phase.IN_FLIGHT] or ["flush"]

    def _sent(self, name: str) -> Request:
        request = self._requests[name]
        return self._flush if request.kind is Kind.FLUSH else request

    def heard(self) -> float:
        return self.heard_at

    def connect(self) -> None:
        self.connects.append(self.now)
        self._say("connect")

    def close(self) -> None:
        self._say("close")

    def fence(self) -> None:
        self._say("fence")

    def wake_at(self, when: float) -> None:
        self._alarms.append(when)

    def event(self, name: str, data: dict[str, object]) -> None:
        self.events.append((name, data))
        self._say(f"event {name}")

    def _say(self, line: str) -> None:
        self.log.append(line)

    # --- the guest -------------------------------------------------------------------------

    def request(self, name: str, kind: Kind, offset: int = 0, length: int = 0) -> Request:
        def answered(request: Request, errno: int, data: Any) -> None:
            assert name not in self.answers, f"a second answer to {name}"
            self.answers[name] = errno, None if data is None else bytes(data)
            self._say(f"answer {name} {e.errorcode[errno]}" if errno else f"answer {name}")

        data = name.encode() * length if kind is Kind.WRITE else None
        request = Request(kind, offset, length, answered, data=data)
        request.tag = _tag_of(name)
        if data is not None:
            slot = self.engine.log.ring.store(data)
            if slot is not None:
                request.owner, request.data, slot.request = slot, slot.data, request
        self._requests[name] = request
        self.engine.submit(request)
        return request

    def write(self, name: str, block: float = 0, blocks: float = 1) -> None:
        self.request(name, Kind.WRITE, int(block * BLOCK), int(blocks * BLOCK))

    def read(self, name: str, block: float = 0, blocks: float = 1) -> None:
        self.request(name, Kind.READ, int(block * BLOCK), int(blocks * BLOCK))

    def zero(self, name: str, block: float = 0, blocks: float = 1) -> None:
        self.request(name, Kind.WRITE_ZEROES, int(block * BLOCK), int(blocks * BLOCK))

    def flush(self, name: str) -> None:
        self.request(name, Kind.FLUSH)

    def cancel(self, name: str) -> None:
        self.engine.cancel(self._requests[name])

    # --- the backend -----------------------------------------------------------------------

    def ok(self, *names: str) -> None:
        for name in names:
            request = self._sent(name)
            data = b"r" * request.length if request.kind is Kind.READ else None
            self.engine.completed(request, 0, data)

    def error(self, name: str, errno: int) -> None:
        self.engine.completed(self._sent(name), errno)

    def up(self, size: int = SIZE, **keywords: Any) -> None:
        self.engine.connected(size, **(STABLE | keywords))

    def lose(self, errno: int = e.ECONNRESET) -> None:
        self.engine.lost(errno)

    def refuse(self, errno: int = e.ECONNREFUSED) -> None:
        self.engine.connect_failed(errno)

    def outage(self) -> None:
        """The connection breaks; the first try is asked for and not answered yet."""
        self.lose()
        self.log.clear()

    # --- time and what left the engine -----------------------------------------------------

    def run(self, seconds: float, *, refuse: bool = False) -> None:
        """Let time pass; with `refuse`, each try to connect fails at once."""
        end = self.now + seconds
        if refuse:
            self._refuse_tries()
        while self._alarms and min(self._alarms) <= end:
            self.now = max(self.now, min(self._alarms))
            self._alarms = [when for when in self._alarms if when > self.now]
            self.engine.wake()
            if refuse:
                self._refuse_tries()
        self.now = end

    def _refuse_tries(self) -> None:
        while "connect" in self.log:
            self.log.remove("connect")
            self.refuse()

    def expect(self, *lines: str) -> None:
        """What left the engine since the last look, in order; events only where named."""
        said = self.take(events=any(line.startswith("event") for line in lines))
        assert said == list(lines), f"\n    expected {list(lines)}\n    but said {said}"

    def take(self, *, events: bool = False) -> list[str]:
        said, self.log = self.log, []
        return [line for line in said if events or not line.startswith("event")]

    def told(self, name: str) -> list[dict[str, object]]:
        """The events of this name so far."""
        return [data for event, data in self.events if event == name]

    @property
    def state(self) -> str:
        return str(self.engine.status()["state"])

    @property
    def counts(self) -> dict[str, int]:
        return self.engine.status()["requests"]  # type: ignore[return-value]
