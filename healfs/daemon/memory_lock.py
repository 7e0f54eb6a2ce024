"""The write log's memory is locked where RLIMIT_MEMLOCK allows.

A SIGKILL of the worker while the kernel copies a payload into a page that was swapped out would
make the guest see EIO.
"""

from __future__ import annotations

import ctypes
import os
import resource

from healfs.config import format_size

_libc = ctypes.CDLL(None, use_errno=True)


def lock(memory: memoryview) -> str:
    """Why it is not locked, for status; "": it is."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if not _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))):
        return ""
    error = os.strerror(ctypes.get_errno())
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    allowed = "unlimited" if limit == resource.RLIM_INFINITY else format_size(limit)
    return (
        f"the write log's {format_size(len(memory))} of memory may be swapped out: {error}; "
        f"RLIMIT_MEMLOCK is {allowed}: raise it (ulimit -l, LimitMEMLOCK=) or lower --log-size"
    )
