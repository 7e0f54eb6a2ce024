# cython: annotation_typing=False
"""Where the payloads of writes live: a ring that messages are read into at its head.

A WRITE's payload is read from /dev/fuse to where it is kept and sent from, with no copy more.
Only what arrived is kept, so 4 KiB writes lie densely. Space is freed at the tail, in the order
of arrival; `evict` moves what would hold it back for long. When less than one message is free,
payloads go to ordinary memory until there is room: /dev/fuse must always be read, or stat hangs.
"""

from __future__ import annotations

from collections import deque

PAGE = 4096  # payloads begin on a page: O_DIRECT takes them as they are
_PAGE = PAGE
STEP = 2 << 20  # bytes made ready at once; a ring that keeps nothing may shrink to so many


class Slot:
    """One payload: in the ring (`end` is the ring's position behind it), or outside (end 0)."""

    __slots__ = ("data", "end", "free", "pinned", "place", "request")

    def __init__(self, data: memoryview | bytearray, place: int, end: int) -> None:
        self.fill(data, place, end)

    def fill(self, data: memoryview | bytearray, place: int, end: int) -> None:
        self.data = data
        self.place = place  # bytes from the start of the ring's memory
        self.end = end  # ever growing
        self.free = False
        self.pinned = False  # an attempt on a closed connection may still read it
        self.request: object = None  # whose payload it is


class Pages:
    """The pages of the ring's memory, from byte to byte: of ordinary memory, always there."""

    def populate(self, start: int, end: int) -> None:
        """They are there from now on."""

    def drop(self, start: int, end: int) -> None:
        """Nothing is kept in them."""


ALWAYS_THERE = Pages()


class PayloadRing:
    """`memory` is a multiple of a page; `message` is the longest payload, in bytes."""

    def __init__(self, memory: memoryview, message: int, pages: Pages = ALWAYS_THERE) -> None:
        if len(memory) < 2 * message or len(memory) % PAGE:
            raise ValueError("the ring is too small for two messages, or no multiple of a page")
        self.size = len(memory)
        self.message = message
        self.memory = memory
        self._head = 0  # positions only grow; position modulo size is the place
        self._tail = 0
        self._slots: deque[Slot] = deque()
        self._scratch = memoryview(b"")
        self.overflow = 0  # bytes in ordinary memory
        self._pages = pages
        self._ready = 0  # so many bytes from the start have their pages
        self._is_shut = False
        self.at = self._room(message)  # in `memory`: where the next payload goes; -1: no room

    @property
    def head(self) -> int:
        """Where the next payload goes: a position that only grows, as Slot.end."""
        return self._head

    @property
    def used(self) -> int:
        return self._head - self._tail

    def _room(self, length: int) -> int:
        """Where `length` bytes are free in one piece, at the head; -1: nowhere. Moves the head over
        an end too short."""
        if self._is_shut:
            return -1
        place = self._head % self.size
        rest = self.size - place
        if rest < length:
            if self._head - self._tail + rest + length > self.size:
                return -1
            self._head += rest
            place = 0
        elif self._head - self._tail + length > self.size:
            return -1
        if place + length > self._ready:
            self._make_ready(place + length)
        return place

    def _make_ready(self, end: int) -> None:
        end = min(self.size, max(end, self._ready + STEP))
        self._pages.populate(self._ready, end)
        self._ready = end

    @property
    def is_small(self) -> bool:
        return self._ready <= STEP

    def shrink(self) -> None:
        """Give memory back, if nothing is kept in it."""
        if not self._slots and not self.is_small and not self._is_shut:
            self._pages.drop(STEP, self._ready)
            self._ready = STEP

    def target(self) -> memoryview:
        """Where the next message's payload is to be read to; see `at`."""
        if self.at < 0:
            self.at = self._room(self.message)
        if self.at >= 0:
            return self.memory[self.at : self.at + self.message]
        if not self._scratch:
            # Copied: its pages are there, too.
            self._scratch = memoryview(bytearray(bytes(self.message)))
        return self._scratch

    def keep(self, length: int) -> Slot:
        """Keep the first `length` bytes of the target."""
        if self.at < 0:
            self.overflow += length
            return Slot(bytearray(self._scratch[:length]), 0, 0)
        return self._take(self.at, length)

    def _take(self, place: int, length: int) -> Slot:
        self._head += -(-length // _PAGE) * _PAGE
        slot: Slot = Slot.__new__(Slot)  # a compiler boxes the arguments of a class
        slot.fill(self.memory[place : place + length], place, self._head)
        self._slots.append(slot)
        self.at = self._room(self.message)
        return slot

    def store(self, data: bytes | bytearray | memoryview) -> Slot | None:
        """Copy a payload in; None when there is no room."""
        length = len(data)
        place = self._room(length)
        if place < 0:
            return None
        self.memory[place : place + length] = data
        return self._take(place, length)

    def store_in_gap(self, data: bytes | bytearray | memoryview) -> Slot | None:
        """`store`, where what was freed behind the tail is room enough; the last such gap."""
        if self._is_shut:
            return None
        size, slots = self.size, list(self._slots)
        length = -(-len(data) // PAGE) * PAGE
        last = len(slots)
        while last:
            end, first = slots[last - 1].end, last
            while first and slots[first - 1].free and not slots[first - 1].pinned:
                first -= 1
            if first and first < last:
                if (end - length) // size < (end - 1) // size:
                    end -= end % size  # in one piece
                if end - length >= slots[first - 1].end:
                    place = (end - length) % size
                    slot = Slot(self.memory[place : place + len(data)], place, end)
                    slot.data[:] = data
                    self._slots = deque([*slots[:first], slot, *slots[last:]])
                    return slot
            last = min(first, last - 1)
        return None

    def close_gap(self) -> None:
        """The tail is where the oldest payload begins, not where one before it ended."""
        if self._slots:
            first = self._slots[0]
            self._tail = first.end - -(-len(first.data) // PAGE) * PAGE

    def release(self, slot: Slot) -> None:
        slot.request = None
        if not slot.end:
            self.overflow -= len(slot.data)
            return
        slot.free = True
        self.advance()

    def shut(self) -> None:
        """Give no room, until `unpin`: what an earlier worker had in flight may still read from
        anywhere, also from where nothing is kept any more."""
        self._is_shut = True
        self.at = -1

    def unpin(self, slots: list[Slot]) -> None:
        """Nothing of the closed connection goes on any more."""
        self._is_shut = False
        for slot in slots:
            slot.pinned = False
        self.advance()

    def advance(self) -> None:
        """Free the tail, as far as nothing holds it back."""
        slots = self._slots
        while slots:
            slot = slots[0]
            if slot.pinned or not slot.free:
                return
            self._tail = slot.end
            slots.popleft()
        # Empty: start over at the front, so that a quiet disk touches few pages.
        self._head = self._tail = 0
        self.at = self._room(self.message)

    def oldest(self) -> Slot | None:
        """What holds back the tail."""
        return self._slots[0] if self._slots else None

    def evict(self, slot: Slot) -> Slot:
        """Move a payload out, to ordinary memory; returns its new slot."""
        outside = Slot(bytearray(slot.data), 0, 0)
        outside.request = slot.request
        self.overflow += len(slot.data)
        self.release(slot)
        return outside

    def adopt(self, place: int, length: int) -> memoryview:
        """A payload that an earlier worker left at `place` (see WriteLog.recover)."""
        return self.memory[place : place + length]

    def restore(self, slots: list[Slot]) -> None:
        """Take over the slots that an earlier worker had in use."""
        self._slots = deque(sorted(slots, key=lambda slot: slot.end))
        if self._slots:
            if self._ready < self.size:
                self._make_ready(self.size)
            first = self._slots[0]
            self._head = self._slots[-1].end
            self._tail = first.end - -(-len(first.data) // PAGE) * PAGE
            self.at = self._room(self.message)
        else:
            self._pages.drop(self._ready, self.size)
