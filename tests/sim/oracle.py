"""What a guest may legally see: a register per sector. It knows nothing of the engine.

Writes to one sector have the order in which the guest asked for them. Each is pending, done
(answered with success) or open (answered with an error, or given up: it may or may not have
happened). A read may see the last write that was done before it, or any newer one. A write is
stable once a FLUSH sent after its completion completes; a FUA write is stable at completion
(virtio 1.2, 5.2.6): from then on the backend's stable store must hold it or a newer one.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable

from healfs.core.request import TAG_MASK, Kind, Request
from tests.sim.plan import SECTOR, Op

POISON = (1 << 63) | 0xDEAD
_FIRST = 1 << 62  # the sectors' first values: _FIRST + sector
_AGAIN = 1 << 61
_WORD = struct.Struct("<Q")


_ID = (1 << 32) - 1


def tag_of(op: Op, order: int, *, again: bool) -> int:
    """As FUSE's unique ids: ever larger, and with a bit more when a request comes again."""
    return (TAG_MASK + 1 if again else 0) | order << 32 | op.id


def op_id(request: Request) -> int:
    """0: a request of the engine's own."""
    return request.tag & _ID


class Violation(BaseException):
    """A rule is broken. Not an Exception: the engine would catch it as a bug of its own."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def first_value(sector: int) -> int:
    return _FIRST + sector


def value_of(op: Op, index: int, *, again: bool = False) -> int:
    """What a write puts into its sector number `index`: no two writes share a value.

    `again`: the caller changed its pages before the kernel sent the request once more.
    """
    return 0 if op.kind is not Kind.WRITE else (_AGAIN if again else 0) | op.id << 8 | index


def encode(values: list[int]) -> bytearray:
    out = bytearray()
    for value in values:
        out += _WORD.pack(value) * (SECTOR // 8)
    return out


def decode(data: bytes | bytearray | memoryview) -> list[int]:
    """The values of whole sectors; a sector of mixed content is a violation in itself."""
    values = []
    for start in range(0, len(data), SECTOR):
        word = bytes(data[start : start + 8])
        if data[start : start + SECTOR] != word * (SECTOR // 8):
            raise Violation("mixed", f"a sector of mixed content: {bytes(data[start:][:64])!r}...")
        values.append(_WORD.unpack(word)[0])
    return values


class Oracle:
    def __init__(self, sectors: int, stable: Callable[[int], int]) -> None:
        self._stable = stable  # what a sector's stable store holds
        self._ops: dict[int, Op] = {}
        self._order: dict[int, int] = {}  # op's id -> the guest's order
        self._done: list[list[int]] = [[0] for _ in range(sectors)]  # orders, sorted
        self._zeroed: list[list[int]] = [[] for _ in range(sectors)]  # orders that left zeroes
        self._floor = [0] * sectors  # the newest write that is done
        self._stable_floor = [0] * sectors
        self._at_flush: dict[int, list[int]] = {}
        self._final: dict[int, int] = {}  # a write's id and index -> its content: see _stays
        self._writes_done: set[int] = set()
        self.answered: set[int] = set()

    def submitted(self, op: Op) -> None:
        self._ops[op.id] = op
        self._order[op.id] = order = len(self._order) + 1
        if op.kind in (Kind.WRITE_ZEROES, Kind.DISCARD):
            for sector in range(op.sector, min(op.sector + op.count, len(self._zeroed))):
                self._zeroed[sector].append(order)
        elif op.kind is Kind.FLUSH:
            self._at_flush[op.id] = self._floor.copy()

    def answer(self, op: Op) -> None:
        if op.id in self.answered:
            raise Violation("double answer", str(op))
        self.answered.add(op.id)

    def done(self, op: Op, *, stable: bool = False) -> None:
        """A WRITE, WRITE_ZEROES or FLUSH was answered with success (a DISCARD promises nothing)."""
        if op.kind is Kind.FLUSH:
            self._flushed(self._at_flush.pop(op.id))
        elif op.kind in (Kind.WRITE, Kind.WRITE_ZEROES):
            order = self._order[op.id]
            self._writes_done.add(op.id)
            for sector in range(op.sector, op.sector + op.count):
                insort(self._done[sector], order)
                self._floor[sector] = self._done[sector][-1]
                if (op.fua or stable) and order > self._stable_floor[sector]:
                    self._stable_floor[sector] = order
                    self.stable_is(sector, self._stable(sector))

    def _flushed(self, floor: list[int]) -> None:
        for sector, order in enumerate(floor):
            if order > self._stable_floor[sector]:
                self._stable_floor[sector] = order
                self.stable_is(sector, self._stable(sector))

    def dropped(self) -> None:
        """The operator had the log thrown away: what was not flushed may be gone."""
        for sector, floor in enumerate(self._stable_floor):
            done = self._done[sector]
            del done[bisect_right(done, floor) :]
            self._floor[sector] = floor
        for at_flush in self._at_flush.values():
            at_flush[:] = map(min, at_flush, self._stable_floor)

    def stable_is(self, sector: int, value: int) -> None:
        """The stable store holds this value now."""
        if self._newest(sector, value) < self._stable_floor[sector]:
            raise Violation(
                "stable",
                f"sector {sector}: stable storage holds {self.name(value)}, "
                f"but {self._who(self._stable_floor[sector])} was promised to be there",
            )

    def read(self, op: Op, values: list[int]) -> None:
        """A READ was answered with these values."""
        if len(values) != op.count:
            raise Violation("short read", f"{op}: {len(values)} sectors")
        order = self._order[op.id]
        for sector, value in enumerate(values, op.sector):
            done = self._done[sector]
            floor = done[bisect_left(done, order) - 1]
            if self._newest(sector, value) < floor:
                raise Violation(
                    "stale read",
                    f"{op}: sector {sector} is {self.name(value)}, "
                    f"but {self._who(floor)} was answered",
                )

    def _newest(self, sector: int, value: int) -> int:
        """The order of the newest write that may have left this value in this sector."""
        if value == 0:
            zeroed = self._zeroed[sector]
            return zeroed[-1] if zeroed else -1
        if value == first_value(sector):
            return 0
        op = self._ops.get((value & ~_AGAIN) >> 8)
        if op is None or op.kind is not Kind.WRITE or op.sector + (value & 255) != sector:
            raise Violation("garbage", f"sector {sector} holds {self.name(value)}")
        if op.id in self._writes_done:
            self._stays(value)
        return self._order[op.id]

    def _stays(self, value: int) -> None:
        """Whose pages changed before the request came again gets either content, but only one."""
        first = self._final.setdefault(value & ~_AGAIN, value)
        if value != first:
            text = f"{self.name(value)} is there, and {self.name(first)} was"
            raise Violation("changed", text)

    def name(self, value: int) -> str:
        if value == POISON:
            return "a payload that was released"
        if value >= _FIRST:
            return f"the first content of sector {value - _FIRST}"
        changed = " changed" if value & _AGAIN else ""
        value &= ~_AGAIN
        return f"#{value >> 8}[{value & 255}]{changed}" if value else "zero"

    def order_of(self, op: Op) -> int:
        """Its place among all that guests have asked for."""
        return self._order[op.id]

    def _who(self, order: int) -> str:
        return next((str(self._ops[i]) for i, o in self._order.items() if o == order), "the first")

    def unanswered(self) -> list[Op]:
        return [op for op in self._ops.values() if op.id not in self.answered]
