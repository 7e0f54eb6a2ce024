"""The thread pool that stands in for io_uring where it is forbidden; the same interface.

The threads are daemons: one that hangs in a dead store does not keep the process from exiting.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
from collections import deque

import trio

from healfs.backends.uring import (
    IORING_OP_FALLOCATE,
    IORING_OP_FSYNC,
    IORING_OP_READ,
    IORING_OP_WRITE,
    Complete,
    Operation,
)

THREADS = 16

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate  # os.posix_fallocate has no mode
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def perform(o: Operation) -> int:
    """Do it here and now; returns what an io_uring completion would: bytes, or -errno."""
    try:
        if o.opcode == IORING_OP_READ:
            return os.preadv(o.fd, [o.view], o.offset, o.flags)
        if o.opcode == IORING_OP_WRITE:
            return os.pwritev(o.fd, [o.view], o.offset, o.flags)
        if o.opcode == IORING_OP_FSYNC:
            os.fdatasync(o.fd)
            return 0
        if o.opcode == IORING_OP_FALLOCATE:
            if _fallocate(o.fd, o.flags, o.offset, o.length) != 0:
                return -ctypes.get_errno()
            return 0
    except OSError as error:
        return -(error.errno or errno.EIO)
    return -errno.EINVAL


class ThreadPool:
    """A Queue (see uring.py) of at most `threads` daemon threads, started as they are needed."""

    fd = -1

    def __init__(self, complete: Complete, *, threads: int = THREADS) -> None:
        self._complete = complete
        self._limit = threads
        self._threads = 0
        self._pushed: list[Operation] = []
        self._work: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._ended: deque[Operation] = deque()
        self._pending = 0
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = threading.Lock()
        self._signalled = False

    def push(self, operation: Operation) -> None:
        self._pushed.append(operation)

    def submit(self) -> None:
        pushed, self._pushed = self._pushed, []
        for operation in pushed:
            self._pending += 1
            self._work.put(operation)
            if self._threads < min(self._limit, self._pending):
                self._start_thread()

    def _start_thread(self) -> None:
        """OSError: there is none, and none can be started. Else those that run do all."""
        try:
            threading.Thread(target=self._run, name="healfs-io", daemon=True).start()
        except RuntimeError as error:
            if not self._threads:
                raise OSError(errno.EAGAIN, str(error)) from None
            return
        self._threads += 1

    def _run(self) -> None:
        while (operation := self._work.get()) is not None:
            operation.result = perform(operation)
            self._ended.append(operation)
            self._signal()

    def _signal(self) -> None:
        # Checked after the append: wait clears the flag before reap looks at the deque.
        if self._signalled:
            return
        with self._open:
            self._signalled = True
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def reap(self) -> int:
        count = 0
        while self._ended:
            operation = self._ended.popleft()
            self._pending -= 1
            count += 1
            self._complete(operation)
        return count

    def attend(self, attended: bool) -> None:
        pass  # its threads tell of everything

    def unsubmitted(self) -> bool:
        return bool(self._pushed)

    def pending(self) -> int:
        return self._pending

    def cancel(self) -> None:
        self._pushed.clear()
        try:
            while self._work.get_nowait() is not None:
                self._pending -= 1
        except queue.Empty:
            pass

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self._event)
        os.eventfd_read(self._event)
        self._signalled = False

    def close(self) -> None:
        if self._event < 0:
            return
        for _ in range(self._threads):
            self._work.put(None)
        # A thread may still be between its append and its write.
        with self._open:
            os.close(self._event)
            self._event = -1
