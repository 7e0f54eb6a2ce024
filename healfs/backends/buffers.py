# cython: annotation_typing=False
"""Page-aligned buffers for reads, and for writes that O_DIRECT or the kernel cannot take as is.

Size classes are powers of two from a page. A pool is bounded in bytes; a buffer is used again.
"""

from __future__ import annotations

import mmap

from healfs.backends.syscalls import address_of

_PAGE = mmap.PAGESIZE
_PAGE_SHIFT = _PAGE.bit_length() - 1


class Buffer:
    __slots__ = ("_length", "address", "order", "view")

    def __init__(self, order: int) -> None:
        self.order = order
        self.view = memoryview(mmap.mmap(-1, 1 << order))
        self.address = address_of(self.view)
        self._length = 1 << order

    def first(self, length: int) -> memoryview:
        """Its first bytes."""
        return self.view if length == self._length else self.view[:length]


class Pool:
    """At most `limit` bytes, except that one buffer of any size is always to be had."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._allocated = 0
        self._free: list[list[Buffer]] = [[] for _ in range(64)]

    def take(self, length: int) -> Buffer | None:
        """A buffer of at least `length` bytes; None: wait until one was given back."""
        order = _PAGE_SHIFT if length <= _PAGE else (length - 1).bit_length()
        free = self._free[order]
        if free:
            return free.pop()
        if self._allocated + (1 << order) > self._limit:
            for index, others in enumerate(self._free):
                self._allocated -= len(others) << index
                others.clear()
            if self._allocated and self._allocated + (1 << order) > self._limit:
                return None
        self._allocated += 1 << order
        return Buffer(order)

    def give(self, buffer: Buffer) -> None:
        free = self._free[buffer.order]
        free.append(buffer)
