"""Exclusive use of an image: the OFD locks that QEMU takes (block/file-posix.c).

Each permission is a byte. Who uses one holds a shared lock on RAW_LOCK_PERM_BASE + bit; who
does not let others use one holds a shared lock on RAW_LOCK_SHARED_BASE + bit. Then each looks
whether somebody else holds the opposite byte. So healfs and QEMU refuse each other.

The locks belong to the open file description. The kernel drops them when the last reference
is gone, that of an operation in flight included: that is the fence of the file backend.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

RAW_LOCK_PERM_BASE = 100
RAW_LOCK_SHARED_BASE = 200

# bit numbers of BLK_PERM_CONSISTENT_READ, _WRITE, _WRITE_UNCHANGED, _RESIZE
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = 0, 1, 2, 3
NAMES = {
    CONSISTENT_READ: "read",
    WRITE: "write",
    WRITE_UNCHANGED: "write",
    RESIZE: "resize",
}

# struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks)
FLOCK = struct.Struct("@hhqqi4x")


class LockedError(OSError):
    """Somebody else uses the image in a way that ours does not go with."""


def _permissions(read_only: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What we use, and what nobody else may."""
    if read_only:
        return (CONSISTENT_READ,), (WRITE, RESIZE)
    # Nobody may even read: what the guest wrote may still wait in healfs.
    everything = (CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE)
    return everything, everything


def _fcntl(fd: int, command: int, kind: int, start: int) -> int:
    answer = fcntl.fcntl(fd, command, FLOCK.pack(kind, os.SEEK_SET, start, 1, 0))
    return int(FLOCK.unpack(answer)[0])


def acquire(fd: int, read_only: bool) -> None:
    """Take our locks. OSError: the file system has none (or somebody holds exclusive ones)."""
    used, unshared = _permissions(read_only)
    for bit in used:
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, RAW_LOCK_PERM_BASE + bit)
    for bit in unshared:
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, RAW_LOCK_SHARED_BASE + bit)


def check(fd: int, read_only: bool) -> None:
    """LockedError when somebody else's use and ours exclude each other; call after acquire."""
    used, unshared = _permissions(read_only)
    # A read-only descriptor may ask about F_WRLCK too: F_OFD_GETLK only looks.
    for bit in used:
        if _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, RAW_LOCK_SHARED_BASE + bit) != (
            fcntl.F_UNLCK
        ):
            raise LockedError(errno.EBUSY, f"somebody else does not share {NAMES[bit]} access")
    for bit in unshared:
        if _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, RAW_LOCK_PERM_BASE + bit) != (
            fcntl.F_UNLCK
        ):
            raise LockedError(errno.EBUSY, f"somebody else has {NAMES[bit]} access")
