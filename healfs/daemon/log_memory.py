"""The write log's memory: the keeper's memfd, which outlives each worker.

A SIGKILL of the worker while the kernel copies a payload into a page that is not there would make
the guest see EIO. So the pages of the ring are made (MADV_POPULATE_WRITE) before anything is read
to them, and locked where RLIMIT_MEMLOCK allows. An idle disk gives them back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource

from healfs.config import MountConfig, format_size
from healfs.core.ring import PAGE, Pages
from healfs.core.writelog import LayoutError, WriteLog, memory_size
from healfs.fuse import wire

MADV_POPULATE_WRITE = 23  # Linux 5.14
MLOCK_ONFAULT = 1
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class LogMemory(Pages):
    """Raises LayoutError where the memory was made for a log of another size."""

    def __init__(self, config: MountConfig, fd: int) -> None:
        self._entries = config.log_entries
        size = memory_size(config.log_size, config.log_entries)
        found = os.fstat(fd).st_size
        if found == 0:
            os.ftruncate(fd, size)
        elif found != size:
            raise LayoutError(
                f"it needs {size} bytes of memory for the write log, there are {found}"
            )
        self._fd = fd
        self._map = mmap.mmap(fd, size)
        self._ring = size - config.log_size  # where it begins
        self.view = memoryview(self._map)

    def write_log(self) -> WriteLog:
        """Raises LayoutError."""
        return WriteLog(self.view, self._entries, wire.MAX_WRITE + PAGE, self)

    def lock(self) -> str:
        """Why it is not locked, for status; "": it is."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        size = len(self.view)
        if not _libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(size), MLOCK_ONFAULT):
            return ""
        error = os.strerror(ctypes.get_errno())
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "unlimited" if limit == resource.RLIM_INFINITY else format_size(limit)
        return (
            f"the write log's {format_size(size)} of memory may be swapped out: {error}; "
            f"RLIMIT_MEMLOCK is {allowed}: raise it (ulimit -l, LimitMEMLOCK=) or lower --log-size"
        )

    def populate(self, start: int, end: int) -> None:
        try:
            self._map.madvise(MADV_POPULATE_WRITE, self._ring + start, end - start)
        except OSError:
            # There is no memory now. The kernel will ask for each page when it has a payload for
            # it; that may find some.
            pass

    def drop(self, start: int, end: int) -> None:
        flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        where = ctypes.c_long(self._ring + start), ctypes.c_long(end - start)
        _libc.fallocate(self._fd, flags, *where)  # refused, it stays as it is
