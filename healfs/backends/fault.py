"""Faults on demand, around any backend: for drills (`healfs mount --fault RULES.toml`) and tests.

The rules are a TOML file, read again when it changes:

    down = true            # the connection is lost, and connect() is refused, until false
    hang = true            # no answers at all until false; then all of them

    [[rule]]               # the first rule that matches decides
    kinds = ["READ"]       # READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES; default: all
    offset = 1048576       # bytes; with length: requests that touch this range (a FLUSH has
    length = 4096          # none, and matches whatever the range)
    errno = "EIO"          # answer with this, without asking the backend; default: ask it
    delay = 250            # milliseconds, before that
    probability = 0.5      # default 1
    count = 3              # so many times; default: for ever
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
import os
import random
import time
import tomllib
from dataclasses import dataclass, field
from typing import Any

import trio

from healfs.backends.base import Backend, Extent, Geometry, SourceError
from healfs.core.request import Done, Kind, Request

LOOK_INTERVAL = 0.05  # seconds between two looks at the rules file
CONNECT_TIMEOUT = 10.0  # seconds that connect() hangs under `hang`

Data = memoryview | bytes | bytearray | None
Answer = tuple[Request, Done, int, bytes | None]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Rule:
    kinds: frozenset[Kind] = frozenset(Kind)
    offset: int = 0
    length: int | None = None
    errno: int = 0
    delay: float = 0.0  # seconds
    probability: float = 1.0
    count: int | None = None

    def matches(self, request: Request) -> bool:
        if request.kind not in self.kinds or self.count == 0:
            return False
        if request.kind != Kind.FLUSH:
            if request.offset + request.length <= self.offset:
                return False
            if self.length is not None and request.offset >= self.offset + self.length:
                return False
        return self.probability >= 1 or random.random() < self.probability


@dataclass(slots=True)
class Rules:
    down: bool = False
    hang: bool = False
    rules: list[Rule] = field(default_factory=list)


def _checked(table: dict[str, Any], types: dict[str, tuple[type, ...]], where: str) -> None:
    for key, value in table.items():
        if key not in types:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(types))}")
        if not isinstance(value, types[key]) or (
            isinstance(value, bool) and bool not in types[key]
        ):
            raise ValueError(f"{where}: {key} = {value!r} is of the wrong type")
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{where}: {key} = {value!r} is negative")


_TOP: dict[str, tuple[type, ...]] = {"down": (bool,), "hang": (bool,), "rule": (list,)}
_RULE: dict[str, tuple[type, ...]] = {
    "kinds": (list,),
    "offset": (int,),
    "length": (int,),
    "errno": (str,),
    "delay": (int, float),
    "probability": (int, float),
    "count": (int,),
}


def _parse_rule(table: Any, where: str) -> Rule:
    if not isinstance(table, dict):
        raise ValueError(f"{where} is no table")
    _checked(table, _RULE, where)
    rule = Rule()
    for key, value in table.items():
        if key == "kinds":
            try:
                rule.kinds = frozenset(Kind[name] for name in value)
            except (KeyError, TypeError):
                known = ", ".join(kind.name for kind in Kind)
                raise ValueError(f"{where}: kinds = {value!r}; known: {known}") from None
        elif key == "errno":
            number = getattr(errno, value, None)
            if not isinstance(number, int):
                raise ValueError(f"{where}: no such errno: {value!r}")
            rule.errno = number
        else:
            setattr(rule, key, value / 1000 if key == "delay" else value)
    return rule


def parse(text: str) -> Rules:
    """ValueError says what is wrong, in one line."""
    table = tomllib.loads(text)
    _checked(table, _TOP, "the file")
    rules = [
        _parse_rule(each, f"rule {number}") for number, each in enumerate(table.get("rule", []), 1)
    ]
    return Rules(table.get("down", False), table.get("hang", False), rules)


class FaultBackend(Backend):
    """Wraps `inner`, and spoils it as the file at `rules_path` says."""

    def __init__(self, inner: Backend, rules_path: str) -> None:
        self._inner = inner
        self.source = inner.source
        self.settle = inner.settle
        self.ambiguous = inner.ambiguous
        self._path = rules_path
        self._rules = Rules(down=True)  # until there are any
        self._wrong = "not read yet"  # why there are none
        self._signature: tuple[int, int, int] | None = None
        self._batch: list[tuple[Request, Done]] = []
        self._answers: list[Answer] = []  # held by `hang`, or made here
        self._delayed: list[tuple[float, int, Request, Done, int]] = []
        self._number = itertools.count()
        self._session = 0  # what an older one still has coming is dropped
        self._more = trio.Event()
        self._scope: trio.CancelScope | None = None

    def resumed(self) -> None:
        self._inner.resumed()

    async def connect(self) -> Geometry:
        self.close()
        self._look()
        if self._wrong:
            raise SourceError(self._wrong)
        deadline = trio.current_time() + CONNECT_TIMEOUT
        while self._rules.hang:
            if trio.current_time() >= deadline:
                raise OSError(errno.ETIMEDOUT, f"{self._path}: hang = true")
            await trio.sleep(LOOK_INTERVAL)
            self._look()
        if self._rules.down:
            raise OSError(errno.ECONNREFUSED, f"{self._path}: down = true")
        return await self._inner.connect()

    def _look(self) -> None:
        """Read the rules again if the file changed."""
        try:
            status = os.stat(self._path)
            signature = status.st_mtime_ns, status.st_ino, status.st_size
            if signature == self._signature:
                return
            self._signature = signature
            with open(self._path, encoding="utf-8") as file:
                self._rules = parse(file.read())
            self._wrong = ""
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            text = f"{self._path}: bad fault rules: {why}; correct the file, or leave out --fault"
            if self._wrong:
                self._wrong, self._signature = text, None
                return
            if self._signature is not None or not isinstance(error, OSError):
                _log.warning("%s; the old rules stay", text)
            if isinstance(error, OSError):
                self._signature = None

    async def serve(self) -> OSError:
        result = OSError(errno.ECONNABORTED, "closed")
        session = self._session
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:

                async def inner() -> None:
                    nonlocal result
                    result = await self._inner.serve()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(inner)
                while session == self._session:
                    self._look()
                    if self._rules.down:
                        result = OSError(errno.ECONNRESET, f"{self._path}: down = true")
                        nursery.cancel_scope.cancel()
                        break
                    self.commit()
                    with trio.move_on_after(self._pause()):
                        await self._more.wait()
                    self._more = trio.Event()
        self._scope = None
        if session == self._session:
            self._forget()
        return result

    def _pause(self) -> float:
        if not self._delayed or self._rules.hang:
            return LOOK_INTERVAL
        return min(LOOK_INTERVAL, max(0.0, self._delayed[0][0] - time.monotonic()))

    def submit(self, request: Request, done: Done) -> None:
        self._batch.append((request, done))
        self._more.set()  # whoever submits it may not commit: a completion that lets it go

    def commit(self) -> None:
        self._look()
        rules = self._rules
        if rules.down or rules.hang:
            return  # serve() ends the session, or commits when the hang is over
        batch, self._batch = self._batch, []
        for request, done in batch:
            self._apply(rules, request, done)
        now = time.monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            _, _, request, done, error = heapq.heappop(self._delayed)
            self._go(request, done, error)
        self._inner.commit()
        answers, self._answers = self._answers, []
        session = self._session
        for request, done, error, data in answers:
            if session == self._session:
                done(request, error, data)

    def _apply(self, rules: Rules, request: Request, done: Done) -> None:
        rule = next((rule for rule in rules.rules if rule.matches(request)), None)
        if rule is None:
            self._go(request, done, 0)
            return
        if rule.count is not None:
            rule.count -= 1
        if rule.delay:
            when = time.monotonic() + rule.delay
            entry = (when, next(self._number), request, done, rule.errno)
            heapq.heappush(self._delayed, entry)
            self._more.set()
        else:
            self._go(request, done, rule.errno)

    def _go(self, request: Request, done: Done, error: int) -> None:
        if error:
            self._answers.append((request, done, error, None))
            return
        session = self._session

        def answered(request: Request, error: int, data: Data) -> None:
            if session != self._session:
                return
            if self._rules.hang:
                kept = None if data is None else bytes(data)
                self._answers.append((request, done, error, kept))
            else:
                done(request, error, data)

        self._inner.submit(request, answered)

    def _forget(self) -> None:
        self._session += 1
        self._batch.clear()
        self._answers.clear()
        self._delayed.clear()

    def close(self) -> None:
        self._forget()
        self._inner.close()
        if self._scope is not None:
            self._scope.cancel()

    async def aclose(self) -> None:
        self.close()
        await self._inner.aclose()

    @property
    def heard(self) -> float:
        return 0.0 if self._rules.hang else self._inner.heard

    def taken(self, request: Request) -> bool:
        return self._inner.taken(request)

    async def probe(self) -> str:
        return "down = true" if self._rules.down else await self._inner.probe()

    async def wait_changed(self) -> None:
        """The rules changed, or what the inner one waits for."""
        async with trio.open_nursery() as nursery:

            async def inner() -> None:
                await self._inner.wait_changed()
                nursery.cancel_scope.cancel()

            nursery.start_soon(inner)
            before = self._signature
            while self._signature == before:
                await trio.sleep(LOOK_INTERVAL)
                self._look()
            nursery.cancel_scope.cancel()

    async def extents(self, offset: int, length: int) -> list[Extent] | None:
        if self._rules.hang:
            return None
        return await self._inner.extents(offset, length)
