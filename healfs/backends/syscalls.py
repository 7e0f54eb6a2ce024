"""What the backends need of the kernel and of C; here by ctypes.

syscalls.pyx is the same for a C compiler, and has the Writer besides.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Protocol

SYS_IO_URING_ENTER = 426  # asm-generic/unistd.h

_syscall = ctypes.CDLL(None, use_errno=True).syscall


def address_of(data: memoryview | bytearray | bytes) -> int:
    """The address of a buffer's first byte, valid while the buffer is held; 0: it is read-only."""
    if memoryview(data).readonly:
        return 0  # ctypes gives that of writable memory only
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def enter(fd: int, submissions: int) -> int:
    """io_uring_enter(2) that waits for nothing: how many were taken, or -errno."""
    taken = int(_syscall(SYS_IO_URING_ENTER, fd, submissions, 0, 0, None, 0))
    return taken if taken >= 0 else -ctypes.get_errno()


def receive(fd: int, memory: memoryview, at: int, room: int) -> int:
    """recv(2) of up to `room` bytes to memory[at:], not waiting: how many, or -errno."""
    try:
        return os.readv(fd, (memory[at : at + room],))
    except OSError as error:
        return -(error.errno or errno.EIO)


class Writer(Protocol):
    """A thread of its own that writes, one after the other, without the interpreter's lock.

    For a file system where io_uring has a kernel thread do every write (ext4): to wake that one
    costs more than the write.
    """

    fd: int  # readable when there may be results

    def push(self, fd: int, address: int, length: int, offset: int) -> None:
        """pwrite(2), after the next submit; fdatasync(2) where the address is 0. At most `entries`
        that have no result yet."""

    def submit(self) -> None:
        """Let the thread begin."""

    def ready(self) -> int:
        """How many have ended; all are to be taken."""

    def attend(self, attended: bool) -> None:
        """True: `ready` is called again and again, so `fd` need not become readable; False: from
        now on it has to, for what was not taken yet, too."""

    def take(self) -> int:
        """The result of the next, in the order of push: bytes (of fdatasync 0), or -errno."""

    def cancel(self) -> None:
        """What was not begun ends with -ECANCELED."""

    def close(self) -> None:
        """End the thread; only when nothing is pending. Waits until it has ended."""


def start_writer(entries: int) -> Writer | None:
    """None: without a compiler there is none, and io_uring writes."""
    return None
