"""The replay: what the backend may have lost is written again, then flushed.

It has the disk to itself: nothing else is in flight. What the backend refuses (EIO, ENOSPC), or
all of it when the flush after it fails, is *suspect*: it stays in the log, reads are served from
it, no flush succeeds, and it is tried again later with what came newer cut out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from healfs.core import errors
from healfs.core.errors import ErrorClass
from healfs.core.overlap import Overlap, Range
from healfs.core.request import Done, Kind, Request
from healfs.core.unsettled import Unsettled
from healfs.core.writelog import visible

ZEROES = 1 << 20  # bytes of one WRITE in place of a WRITE_ZEROES


class Piece(Range):
    """Bytes [start, end) of an entry that the backend may not have."""

    __slots__ = ("entry",)

    def __init__(self, entry: Request, start: int, end: int) -> None:
        self.entry, self.start, self.end = entry, start, end

    def bytes(self, start: int, end: int) -> bytes:
        """A copy of a part of it; zeroes for an entry without payload."""
        if self.entry.data is None:
            return bytes(end - start)
        at = self.entry.offset
        return bytes(self.entry.data[start - at : end - at])


class Suspects:
    """The suspect pieces, by place."""

    def __init__(self) -> None:
        self._pieces = Overlap()
        self._entries = Overlap()
        self._count: dict[int, int] = {}  # pieces, by the entry's order
        self.all: dict[int, Piece] = {}  # by id

    def add(self, piece: Piece) -> None:
        order = piece.entry.order
        if order not in self._count:
            self._count[order] = 0
            self._entries.add(piece.entry)
        self._count[order] += 1
        self._pieces.add(piece)
        self.all[id(piece)] = piece

    def add_visible(self, unflushed: Iterable[Request]) -> None:
        """All that these entries show."""
        for entry, start, end in visible(
            entry for entry in unflushed if entry.kind is not Kind.DISCARD
        ):
            self.add(Piece(entry, start, end))

    def _remove(self, piece: Piece) -> bool:
        """Whether it was its entry's last one."""
        self._pieces.remove(piece)
        del self.all[id(piece)]
        order = piece.entry.order
        self._count[order] -= 1
        if self._count[order]:
            return False
        del self._count[order]
        self._entries.remove(piece.entry)
        return True

    def cut(self, start: int, end: int) -> list[Request]:
        """A newer write has reached the backend; returns entries with no piece left."""
        cut_away = []
        for piece in self._pieces.find(start, end):
            assert isinstance(piece, Piece)
            if piece.start < start:
                self.add(Piece(piece.entry, piece.start, start))
            if end < piece.end:
                self.add(Piece(piece.entry, end, piece.end))
            if self._remove(piece):
                cut_away.append(piece.entry)
        return cut_away

    def overlay(self, start: int, end: int) -> list[tuple[int, bytes]]:
        """What a read of [start, end) must show of them: (offset, copy of the bytes).

        Copies, taken when the read is sent: a newer write may cut the piece before it returns.
        """
        parts = []
        for piece in self._pieces.find(start, end):
            assert isinstance(piece, Piece)
            low, high = max(start, piece.start), min(end, piece.end)
            parts.append((low, piece.bytes(low, high)))
        return parts

    def hide(self, entry: Request) -> bool:
        """Does this newer entry hide a part of a suspect one? Then it must stay, stable or not:
        a later replay would put the older bytes over it."""
        for older in self._entries.find(entry.start, entry.end):
            assert isinstance(older, Request)
            if older.order < entry.order:
                return True
        return False


class Replay:
    def __init__(self) -> None:
        self.wanted = False  # nothing that is not flushed is certain
        self.running = False
        self.flushing = False
        self.suspects = Suspects()
        self.errno = 0  # why flushes do not succeed now
        self._entries: list[Request] = []  # what this replay covers
        self._todo: deque[tuple[Request, int, int]] = deque()
        self._in_flight = Overlap()
        self._write_zeroes = True  # the backend can; else zeroes are written

    @property
    def latched(self) -> bool:
        """No flush may succeed (promise 5)."""
        return self.wanted or bool(self.suspects.all)

    @property
    def lacking(self) -> bool:
        """Whether the backend may lack answered bytes beside what it is sent now."""
        return bool(self.suspects.all) or (self.wanted and not self.running)

    def begin(self, unflushed: list[Request]) -> None:
        """Write again all of it, or, where only suspect pieces are left, those."""
        self.running, self.flushing = True, False
        self._in_flight = Overlap()
        self._write_zeroes = True
        if self.wanted:
            self._entries = unflushed
            self._todo = deque(visible(unflushed))
        else:
            pieces = sorted(self.suspects.all.values(), key=lambda p: (p.entry.order, p.start))
            self._entries = list({p.entry.order: p.entry for p in pieces}.values())
            self._todo = deque((p.entry, p.start, p.end) for p in pieces)
        self.suspects = Suspects()

    def stop(self) -> None:
        """The connection is gone, or the disk was paused: it begins anew later."""
        self.wanted = self.wanted or self.running
        self.running = self.flushing = False
        self._todo.clear()

    def next(self, align: int, unsettled: Unsettled, on_answer: Done) -> Request | None:
        """The next piece to be sent now, as a request; None: not now, or there is none."""
        if not self._todo:
            return None
        entry, start, end = self._todo[0]
        kind, data = entry.kind, None
        rest = end
        if kind is Kind.WRITE_ZEROES and not self._write_zeroes:
            kind, end = Kind.WRITE, min(end, start + ZEROES)
            data = memoryview(bytes(end - start))
        # Two pieces in one minimum block are two read, modify, writes of it: one after the other.
        low, high = start - start % align, end + -end % align
        if self._in_flight.find(low, high):
            return None
        if len(unsettled):
            # Of a late piece of the same entry, what it carries of this one may be older.
            parts = low < start > entry.offset or high > end < entry.offset + entry.length
            if unsettled.holds_back_piece(low, high, entry.order, parts=parts):
                return None
        self._todo.popleft()
        if end < rest:
            self._todo.appendleft((entry, end, rest))
        if entry.data is not None:
            data = memoryview(entry.data)[start - entry.offset : end - entry.offset]
        piece = Request(kind, start, end - start, on_answer, data=data, may_unmap=entry.may_unmap)
        piece.start, piece.end = low, high
        piece.origin = entry
        self._in_flight.add(piece)
        return piece

    @property
    def done(self) -> bool:
        """All pieces were written or refused: the flush is next."""
        return not self._todo and not len(self._in_flight)

    def written(self, piece: Request) -> None:
        self._in_flight.remove(piece)

    def refused(self, piece: Request, errno: int) -> None:
        self._in_flight.remove(piece)
        assert piece.origin is not None
        refused = errors.classify(errno) is ErrorClass.REFUSED
        if piece.kind is Kind.WRITE_ZEROES and refused:
            self._write_zeroes = False  # a server that came back with less than it had
            self._todo.appendleft((piece.origin, piece.offset, piece.offset + piece.length))
            return
        if piece.kind is Kind.DISCARD:
            return  # a hint that was not taken: nothing to make good
        self.suspects.add(Piece(piece.origin, piece.offset, piece.offset + piece.length))
        self.errno = errno

    def succeeded(self) -> list[Request]:
        """The flush after it has succeeded: the entries that are stable now."""
        self.wanted = self.running = self.flushing = False
        suspect = {piece.entry.order for piece in self.suspects.all.values()}
        entries, self._entries = self._entries, []
        return [entry for entry in entries if entry.order not in suspect]

    def failed(self, errno: int, unflushed: Iterable[Request]) -> None:
        """The flush after it has failed: all is suspect, and comes again."""
        self.wanted = True
        self.running = self.flushing = False
        self.errno = errno
        self.suspects = Suspects()
        self.suspects.add_visible(unflushed)


def covers(parts: Iterable[tuple[int, bytes]], start: int, end: int) -> bool:
    """Do the (disjoint) parts cover the range?"""
    return sum(len(data) for _, data in parts) == end - start


def patch(data: object, start: int, parts: Iterable[tuple[int, bytes]]) -> bytearray:
    """The bytes of a read that begins at `start`, with the parts put over them."""
    assert isinstance(data, memoryview | bytes | bytearray)
    patched = bytearray(data)
    for offset, part in parts:
        patched[offset - start : offset - start + len(part)] = part
    return patched
