"""Standard error for processes that must not wait for its reader. Standard library only.

A pipe that nobody reads, a journal that stalls (its own disk may be one of ours): lines that are
not taken at once are dropped and counted, and the next ones that are taken say how many.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from typing import TextIO, cast

PIECE = 128  # bytes


class Lines(io.TextIOBase):
    """A text stream whose `write` never waits and never raises an OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._begun = ""  # a line that has no end yet
        self._rest = b""  # of lines that were taken in part
        self._dropped = 0

    def write(self, text: str) -> int:
        lines, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._write_lines(lines + newline)
        return len(text)

    def _write_lines(self, lines: str) -> None:
        note = f"healfs: {self._dropped} lines dropped: nobody read them\n" if self._dropped else ""
        data = self._rest + (note + lines).encode(errors="backslashreplace")
        try:
            taken = _write_now(self._fd, data)
        except OSError:
            taken = 0
        if taken > len(self._rest):
            self._rest, self._dropped = data[taken:], 0
        else:
            self._rest = self._rest[taken:]
            self._dropped += lines.count("\n")


def _write_now(fd: int, data: bytes) -> int:
    """How much was taken. The description is others', too: O_NONBLOCK is not ours to set."""
    try:
        return os.pwritev(fd, (data,), -1, os.RWF_NOWAIT)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.write(fd, data)
    # A terminal; before Linux 6.4, a pipe.
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        own = os.open(f"/proc/self/fd/{fd}", flags)
    except PermissionError:  # after su(1): the terminal is the user's that was before
        return _write_while_ready(fd, data)
    try:
        return os.write(own, data)
    finally:
        os.close(own)


def _write_while_ready(fd: int, data: bytes) -> int:
    """As near as it comes: a terminal may be ready and have room for less."""
    taken = 0
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while taken < len(data) and poll.poll(0):
        taken += os.write(fd, data[taken : taken + PIECE])
    return taken


def use() -> None:
    """For all that this process says on standard error, its traceback at the end, too."""
    sys.stderr = cast(TextIO, Lines(2))
