"""Where the payloads of writes live: a ring that messages are read into at its head.

A WRITE's payload is read from /dev/fuse to where it is kept and sent from, with no copy more.
Only what arrived is kept, so 4 KiB writes lie densely. The ring frees in order of arrival, so
one old payload holds back the tail; when less than one message is free, payloads go to ordinary
memory until there is room: /dev/fuse must always be read, or stat hangs.
"""

from __future__ import annotations

import mmap
from collections import deque

PAGE = mmap.PAGESIZE  # payloads begin on a page: O_DIRECT takes them as they are


class Slot:
    """One payload in the ring, or (end 0) in memory of its own."""

    __slots__ = ("data", "end", "free")

    def __init__(self, data: memoryview | bytearray, end: int) -> None:
        self.data = data
        self.end = end  # the ring's position behind it, ever growing
        self.free = False


class PayloadRing:
    """`size` and `message` (the longest payload) in bytes; size is a multiple of the page."""

    def __init__(self, size: int, message: int) -> None:
        if size < 2 * message:
            raise ValueError("the ring is too small for two messages")
        self.size = size
        self.message = message
        self._memory = memoryview(mmap.mmap(-1, size))
        self._head = 0  # positions only grow; position modulo size is the place
        self._tail = 0
        self._slots: deque[Slot] = deque()
        self._scratch = bytearray(message)
        self.overflow = 0  # bytes in ordinary memory
        self.window = self._window()

    @property
    def used(self) -> int:
        return self._head - self._tail

    def _window(self) -> memoryview | None:
        place = self._head % self.size
        room = self.size - place
        if room < self.message:  # a message does not wrap: it starts again at 0
            if self.used + room + self.message > self.size:
                return None
            self._head += room
            place = 0
        elif self.used + self.message > self.size:
            return None
        return self._memory[place : place + self.message]

    def target(self) -> memoryview | bytearray:
        """Where the next message's payload is to be read to."""
        if self.window is None:
            self.window = self._window()
        return self._scratch if self.window is None else self.window

    def keep(self, length: int) -> Slot:
        """Keep the first `length` bytes of the target."""
        if self.window is None:
            self.overflow += length
            return Slot(self._scratch[:length], 0)
        slot = Slot(self.window[:length], 0)
        self._head += -(-length // PAGE) * PAGE
        slot.end = self._head
        self._slots.append(slot)
        self.window = self._window()
        return slot

    def release(self, slot: Slot) -> None:
        if not slot.end:
            self.overflow -= len(slot.data)
            return
        slot.free = True
        slots = self._slots
        while slots and slots[0].free:
            self._tail = slots.popleft().end
        if not slots:
            # Empty: start over at the front, so that a quiet disk touches few pages.
            self._head = self._tail = 0
            self.window = self._memory[: self.message]
