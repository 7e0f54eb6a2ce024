"""How much would be lost if keeper and worker were killed now: two numbers beside the socket.

The log itself is memory that goes with its processes. The worker counts in this account what is in
the log, and what waits to be answered, so that it is never too small.

Standard library only, but for healfs.config: the keeper uses it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct

from healfs.config import counted

NAME = "unflushed"
_ACCOUNT = struct.Struct("<qq")  # requests, bytes
NO_LOG = -1  # requests: the backend cannot flush, or there was no need to


class Account:
    """A file in `directory`, mapped: no system call. Where that fails, nothing is kept."""

    def __init__(self, directory: str) -> None:
        self._memory: mmap.mmap | None = None
        self._last: tuple[int, int] | None = None
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(os.path.join(directory, NAME), flags, 0o600)
            try:
                # A page that a full file system cannot give would be a SIGBUS.
                os.posix_fallocate(fd, 0, _ACCOUNT.size)
                self._memory = mmap.mmap(fd, _ACCOUNT.size)
            finally:
                os.close(fd)

    def set(self, requests: int, size: int) -> None:
        if self._memory is not None and (requests, size) != self._last:
            self._last = (requests, size)
            _ACCOUNT.pack_into(self._memory, 0, requests, size)


def read(directory: str) -> tuple[int, int] | None:
    """(requests, bytes), at the most; None: not known."""
    try:
        with open(os.path.join(directory, NAME), "rb") as file:
            requests, size = _ACCOUNT.unpack(file.read(_ACCOUNT.size))
    except (OSError, struct.error):
        return None
    return requests, size


def loss(directory: str) -> str:
    """What goes with the processes, for people."""
    account = read(directory)
    if account is None:
        return "what was answered and not flushed is lost; how much is not known"
    requests, size = account
    if requests == NO_LOG:
        return "the backend cannot flush: what was written last may be lost"
    if not requests:
        return "nothing is lost: all that was answered was flushed"
    one = f"request ({size} bytes) that was answered and not flushed is lost"
    many = f"requests ({size} bytes) that were answered and not flushed are lost"
    return f"at most {counted(requests, one, many)}"
