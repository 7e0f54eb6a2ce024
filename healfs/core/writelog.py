# cython: annotation_typing=False
"""The write log: each write from before it is sent until a flush covers it.

It lives in memory that outlives the worker (a memfd of the keeper's): a page of header with the
engine's saved state, a table of fixed records, and the payload ring. A record is written whole
before its state word, and its state word is cleared before it is used again, so a worker that is
killed between two stores leaves a record that is either whole or free. Of two entries that overlap,
the older one always goes first: found alone, it would be written over newer bytes.

The trim rule (promise 5): a flush that succeeds removes exactly the entries that the backend
completed before that flush was sent on the same connection. `mark` is taken when the flush is
sent, `trim(mark)` when it has succeeded; `lost` makes all entries wait for a replay.
"""

from __future__ import annotations

import json
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from healfs.core.overlap import Overlap, Range
from healfs.core.request import Done, Kind, Phase, Request
from healfs.core.ring import ALWAYS_THERE, PAGE, Pages, PayloadRing, Slot

FREE, SENT, COMPLETED, UNSETTLED = 0, 1, 2, 3
# state, kind, flags, -, order, tag, offset, length, place in the ring, end in the ring, until
RECORD = struct.Struct("<IBBHQQQQQQd")
WORDS = 8  # of 8 bytes; the first begins with the state
FUA, MAY_UNMAP, FOREIGN = 1, 2, 4
NOWHERE = (1 << 64) - 1  # a place: there is no payload
HEADER = 16384  # magic, and two copies of the saved state
# With the number of the layout: of the records, of the ring, and of what the engine saves.
MAGIC = b"healfs write log 1\n"
STATE_COPIES = (4096, 8192 + 2048)  # each: sequence, length, CRC, JSON
STATE_HEAD = struct.Struct("<QII")
RESERVED = 512  # records for unsettled attempts: one a request in flight
_RESERVED = RESERVED


class LayoutError(ValueError):
    """The memory was laid out by another version of healfs; one line."""


class Attempt(Range):
    """An attempt of unknown fate: sent on a connection that is gone. See core/unsettled.py.

    `order` is the request's, `until` the clock's time. `foreign`: a part of a block, written with
    the rest of it as that was then, which may have lacked what an older write had put there.
    """

    __slots__ = ("foreign", "order", "record", "until", "waiters")

    def __init__(
        self,
        start: int,
        end: int,
        order: int,
        until: float,
        record: int = -1,
        foreign: bool = False,
    ) -> None:
        self.start = start
        self.end = end
        self.order = order
        self.until = until
        self.record = record
        self.foreign = foreign
        self.waiters: list[Request] | None = None


def memory_size(payload: int, entries: int) -> int:
    """Bytes of memory for a log of so many payload bytes and entries."""
    return HEADER + -(-entries * RECORD.size // PAGE) * PAGE + payload


def check_layout(memory: memoryview) -> None:
    """Raises LayoutError where an earlier worker's memory is not as this version makes it."""
    found = bytes(memory[: len(MAGIC)])
    if found not in (MAGIC, bytes(len(MAGIC))):
        raise LayoutError(f"the write log is of layout {found!r}, not {MAGIC!r}")


class WriteLog:
    """`memory` is all zeroes (a new log) or what an earlier worker left (then call recover).

    `entries` is the number of records; RESERVED of them are for unsettled attempts.
    Raises LayoutError.
    """

    def __init__(
        self, memory: memoryview, entries: int, message: int, pages: Pages = ALWAYS_THERE
    ) -> None:
        if entries < 2 * RESERVED:
            raise ValueError(f"the log needs at least {2 * RESERVED} entries")
        check_layout(memory)
        self.limit = entries - RESERVED
        table = -(-entries * RECORD.size // PAGE) * PAGE
        self._header = memory[:HEADER]
        self._table = memory[HEADER : HEADER + table]
        self._words = self._table.cast("Q")
        self._states = self._table.cast("I")[:: 2 * WORDS]
        self.ring = PayloadRing(memory[HEADER + table :], message, pages)
        self._free = list(range(entries - 1, -1, -1))
        self._entries: dict[int, Request] = {}  # by order
        self._completed: deque[Request] = deque()  # on this connection, in that order
        self._held_ranges = Overlap()
        self._held: dict[int, Request] = {}  # stable, but needed to hide an older entry
        self._count = 0  # completions; an entry's `completed` is this, from 1
        self._sequence = 0
        self.keep = True  # False: the backend has no volatile cache, answered is stable
        self._header[: len(MAGIC)] = MAGIC

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def half_full(self) -> bool:
        completed = len(self._completed)
        return completed > 0 and (
            completed * 2 >= self.limit or self.ring.used * 2 >= self.ring.size
        )

    @property
    def is_trimmable(self) -> bool:
        """Whether a flush that is sent now frees anything."""
        return bool(self._completed)

    def as_dict(self) -> dict[str, object]:
        """For status."""
        return {
            "enabled": self.keep,
            "requests": len(self._entries),
            "bytes": self.ring.used,
            "limit_requests": self.limit,
            "limit_bytes": self.ring.size,
        }

    # --- entries ----------------------------------------------------------------------------

    def enter(self, request: Request) -> bool:
        """Before it is sent for the first time. False: there is no room, it has to wait."""
        if len(self._free) <= _RESERVED:
            return False
        slot = request.owner
        if slot is not None and not slot.end and not self._take_in(request, slot):
            return False
        self._write(self._free.pop(), SENT, request)
        return True

    def _take_in(self, request: Request, slot: Slot) -> bool:
        """Copy a payload from ordinary memory into the ring."""
        while (inside := self.ring.store(slot.data)) is None:
            if not self._make_room():
                return False
        inside.request = request
        request.owner, request.data = inside, inside.data
        self.ring.release(slot)
        return True

    def _make_room(self) -> bool:
        """What holds back the ring's tail and is not in the log yet goes out."""
        oldest = self.ring.oldest()
        if oldest is None or oldest.request is None:
            return False
        request = oldest.request
        assert isinstance(request, Request)
        if request.record >= 0:
            return False  # only a flush makes room
        outside = self.ring.evict(oldest)
        request.owner, request.data = outside, outside.data
        return True

    def move_up(self) -> None:
        """Bring what holds back the ring's tail to its head: a write that does not land for long
        (a bad sector, a range that is not settled) must not stop those to other ranges."""
        ring = self.ring
        once_round = ring.head
        moved: set[int] = set()
        while ring.used * 2 >= ring.size and (slot := ring.oldest()) is not None:
            if slot.end > once_round or slot.end in moved or not self._free:
                return
            request = slot.request
            if not isinstance(request, Request) or request.record < 0:
                return
            if request.phase is Phase.IN_FLIGHT or slot.pinned:
                return  # the backend reads it
            if request.completed and not self._is_stuck(request):
                return  # the next flush frees it
            # Where the ring is full to the brim, there may be room behind it alone.
            copy = ring.store(slot.data) or ring.store_in_gap(slot.data)
            if copy is None:
                return
            moved.add(copy.end)
            state = COMPLETED if request.completed else SENT
            copy.request = request
            request.owner, request.data = copy, copy.data
            # A new record before the old one goes: killed in between, recover() finds both.
            old = request.record
            self._write(self._free.pop(), state, request)
            self._states[old] = FREE
            self._free.append(old)
            ring.release(slot)
            ring.close_gap()

    def _is_stuck(self, request: Request) -> bool:
        """Completed, but no running flush will free it."""
        completed = self._completed
        return not completed or request.completed < completed[0].completed

    def _write(self, index: int, state: int, request: Request) -> None:
        slot = request.owner
        words, at = self._words, index * WORDS
        words[at + 1] = request.order
        words[at + 2] = request.tag
        words[at + 3] = request.offset
        words[at + 4] = request.length
        if slot is None:
            words[at + 5], words[at + 6] = NOWHERE, 0
        else:
            words[at + 5], words[at + 6] = slot.place, slot.end
        words[at + 7] = 0
        request.record = index
        # No compiler moves a store across this call: the state comes last.
        self._entries[request.order] = request
        kind = request.kind
        flags = (FUA if request.fua else 0) | (MAY_UNMAP if request.may_unmap else 0)
        words[at] = state | kind << 32 | flags << 40

    def complete(self, request: Request, hold: Callable[[Request], bool] | None = None) -> None:
        """The backend has done it: it stays until a flush covers it, and while `hold` says so."""
        self._count += 1
        request.completed = self._count
        if not self.keep and hold is None:
            self.leave(request)
            return
        self._states[request.record] = COMPLETED
        if self.keep:
            self._completed.append(request)
        else:
            self._stable(request, hold)

    def leave(self, request: Request) -> None:
        """It is on stable storage, or was answered with an error: the log keeps it no more."""
        if request.record >= 0:
            self._states[request.record] = FREE
            self._free.append(request.record)
            request.record = -1
            del self._entries[request.order]
        self.release(request)

    def release(self, request: Request) -> None:
        """Nobody needs the payload any more."""
        slot = request.owner
        if slot is not None:
            request.data = request.owner = None
            self.ring.release(slot)

    # --- flushes ----------------------------------------------------------------------------

    def mark(self) -> int:
        """What a flush sent now will cover."""
        return self._count

    def trim(self, mark: int, hold: Callable[[Request], bool] | None = None) -> None:
        """A flush with this mark has succeeded, on the connection it was sent on.

        `hold` tells which entries stay for now although they are stable. They go as they were
        completed: of two that overlap, the older one first, since the newer waited for it.
        """
        completed = self._completed
        if hold is not None:
            while completed and completed[0].completed <= mark:
                self._stable(completed.popleft(), hold)
            return
        # `leave`, at the cost of no call for each of thousands of entries.
        states, free, entries = self._states, self._free, self._entries
        while completed:
            request = completed[0]
            if request.completed > mark:
                break
            completed.popleft()
            index = request.record
            if index >= 0:
                states[index] = FREE
                free.append(index)
                request.record = -1
                del entries[request.order]
            slot = request.owner
            if slot is not None:
                request.data = request.owner = slot.request = None
                if slot.end:
                    slot.free = True
                else:
                    self.ring.overflow -= len(slot.data)
        self.ring.advance()

    def _stable(self, request: Request, hold: Callable[[Request], bool] | None) -> None:
        if hold is not None and (hold(request) or self._hides_held(request)):
            for older in self._held_ranges.find(request.offset, request.offset + request.length):
                assert isinstance(older, Request)
                whole = request.offset <= older.offset
                whole &= older.offset + older.length <= request.offset + request.length
                whole &= request.kind is not Kind.DISCARD  # which hides nothing: see visible
                if whole and older.order < request.order:  # this one hides all that it hid
                    del self._held[older.order]
                    self._held_ranges.remove(older)
                    self.leave(older)
            self._held[request.order] = request
            self._held_ranges.add(request)
        elif request.record >= 0:
            self.leave(request)

    def _hides_held(self, request: Request) -> bool:
        for older in self._held_ranges.find(request.start, request.end):
            assert isinstance(older, Request)
            if older.order < request.order:
                return True
        return False

    def lost(self) -> None:
        """The backend may have lost all that is not flushed: no running flush covers any of it."""
        self._completed.clear()

    def has_unflushed(self) -> bool:
        return any(request.completed for request in self._entries.values())

    def unflushed(self) -> list[Request]:
        """The completed entries, oldest first."""
        return [r for _, r in sorted(self._entries.items()) if r.completed]

    def replayed(
        self,
        entries: Iterable[Request],
        hold: Callable[[Request], bool] | None = None,
        mark: int = 0,
    ) -> None:
        """These are stable now, and so is all that had completed at `mark`.

        They go oldest first, with what was held if nothing has to be any more: whoever takes
        over between two stores must never find an older entry without the newer one over it.
        """
        gone = {request.order: request for request in entries}
        completed = self._completed
        while completed and completed[0].completed <= mark:
            request = completed.popleft()
            gone[request.order] = request
        if hold is None:
            gone.update(self._held)
        for order in sorted(gone):
            request = gone[order]
            if self._held.pop(order, None) is not None:
                self._held_ranges.remove(request)
            self._stable(request, hold)

    # --- unsettled attempts -----------------------------------------------------------------

    def note(self, attempt: Attempt) -> None:
        """Remember an attempt across the worker's death, as far as there are records."""
        if not self._free:
            return
        index = attempt.record = self._free.pop()
        RECORD.pack_into(
            self._table,
            index * RECORD.size,
            *(FREE, Kind.WRITE, FOREIGN if attempt.foreign else 0, 0),
            *(attempt.order, 0, attempt.start),
            *(attempt.end - attempt.start, NOWHERE, 0, attempt.until),
        )
        self._states[index] = UNSETTLED

    def forget(self, attempt: Attempt) -> None:
        if attempt.record >= 0:
            self._states[attempt.record] = FREE
            self._free.append(attempt.record)
            attempt.record = -1

    # --- the take-over ----------------------------------------------------------------------

    def recover(self, on_answer: Done) -> tuple[list[Request], list[Attempt]]:
        """What an earlier worker left: its entries, oldest first, and its unsettled attempts.

        A completed entry's request.completed is 1, an unanswered one's 0.
        """
        by_order: dict[int, Request] = {}
        attempts: list[Attempt] = []
        self._free = []
        for index in range(self.limit + RESERVED):
            fields = RECORD.unpack_from(self._table, index * RECORD.size)
            state, kind, flags, _, order, tag, offset, length, place, end, until = fields
            if state == UNSETTLED:
                foreign = bool(flags & FOREIGN)
                attempts.append(Attempt(offset, offset + length, order, until, index, foreign))
            elif state in (SENT, COMPLETED) and order in by_order:  # see move_up
                self._states[index] = FREE
                self._free.append(index)
            elif state in (SENT, COMPLETED):
                request = Request(
                    Kind(kind),
                    offset,
                    length,
                    on_answer,
                    fua=bool(flags & FUA),
                    may_unmap=bool(flags & MAY_UNMAP),
                    tag=tag,
                )
                request.order, request.record = order, index
                request.completed = int(state == COMPLETED)
                if place != NOWHERE:
                    slot = Slot(self.ring.adopt(place, length), place, end)
                    slot.request = request
                    request.owner, request.data = slot, slot.data
                by_order[order] = request
            else:
                self._free.append(index)
        self._free.reverse()
        found = [by_order[order] for order in sorted(by_order)]
        self._entries = {request.order: request for request in found}
        self.ring.restore([r.owner for r in found if r.owner is not None])
        return found, attempts

    def replace(self, entry: Request, request: Request) -> None:
        """The request that came again takes the place, order and bytes of its first time."""
        request.order, request.record = entry.order, entry.record
        request.owner, request.data = entry.owner, entry.data
        if request.owner is not None:
            request.owner.request = request
        self._entries[request.order] = request

    def save(self, state: dict[str, object]) -> None:
        """Keep the engine's state, whole or not at all: two copies, written in turn."""
        data = json.dumps(state).encode()
        self._sequence += 1
        at = STATE_COPIES[self._sequence % 2]
        head = STATE_HEAD.pack(self._sequence, len(data), zlib.crc32(data))
        if at + len(head) + len(data) > (HEADER if self._sequence % 2 else STATE_COPIES[1]):
            raise ValueError(f"the engine's state is too large to be saved: {len(data)} bytes")
        self._header[at : at + STATE_HEAD.size] = bytes(STATE_HEAD.size)
        self._header[at + STATE_HEAD.size : at + STATE_HEAD.size + len(data)] = data
        self._header[at : at + STATE_HEAD.size] = head

    def saved(self) -> dict[str, object] | None:
        """The newest whole copy of what was saved; None for a new log."""
        best: tuple[int, bytes] | None = None
        for at in STATE_COPIES:
            sequence, length, checksum = STATE_HEAD.unpack_from(self._header, at)
            data = bytes(self._header[at + STATE_HEAD.size :][:length])
            if sequence and zlib.crc32(data) == checksum and (not best or sequence > best[0]):
                best = (sequence, data)
        if best is None:
            return None
        self._sequence = best[0]
        state = json.loads(best[1])
        assert isinstance(state, dict)
        return state


def visible(entries: Iterable[Request]) -> Iterator[tuple[Request, int, int]]:
    """The newest bytes of each place: pieces (entry, start, end) that do not overlap.

    `entries` come oldest first; so do the pieces. A replay writes these only: an older write
    must not be put over a newer one that is stable already. (Below a DISCARD they may: then the
    pieces overlap, and their order counts.)
    """
    starts: list[int] = []  # disjoint covered ranges, sorted
    ends: list[int] = []
    pieces: list[tuple[Request, int, int]] = []
    for request in reversed(list(entries)):
        start, end = request.offset, request.offset + request.length
        first = bisect_left(ends, start)  # ranges that touch [start, end]
        last = bisect_right(starts, end)
        at, mine = start, []
        for i in range(first, last):
            if at < starts[i]:
                mine.append((request, at, starts[i]))
            at = max(at, ends[i])
        if at < end:
            mine.append((request, at, end))
        pieces += reversed(mine)
        if request.kind is Kind.DISCARD:
            continue  # a hint: the backend may keep the older bytes, so these must be right
        if first < last:
            start, end = min(start, starts[first]), max(end, ends[last - 1])
        starts[first:last] = [start]
        ends[first:last] = [end]
    return reversed(pieces)
