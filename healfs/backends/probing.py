"""The probe that decides what EIO and EROFS of a file or block device mean.

Either the storage is away (a device that went offline, a file system that was shut down), or this
one request failed (a bad sector). Looks, in a thread, for each may wait: is it still the same file,
can it be changed, does the kernel call the device offline, is it as large as it was, and can
anything be read?
"""

from __future__ import annotations

import errno
import mmap
import os
import stat


def probe(path: str, fd: int, *, size: int, read_only: bool) -> str:
    """Why the storage is away; "" if it is there, and so the request itself has failed.

    `size` is what it had when it was opened.
    """
    try:
        opened = os.fstat(fd)
        named = os.stat(path)
        if stat.S_ISBLK(opened.st_mode):
            if named.st_rdev != opened.st_rdev:
                return "another device has taken its name"
            state = disk_state(opened.st_rdev)
            if state not in ("running", "live", ""):
                return f"the device is {state}"
        else:
            if (named.st_ino, named.st_dev) != (opened.st_ino, opened.st_dev):
                return "another file has taken its name"
            if not read_only and not _can_change(fd):
                return "its file system is read-only now: unmount it, fsck, mount it again"
        left = os.lseek(fd, 0, os.SEEK_END)
        if left < size:  # behind it every read is short: only another look at its size helps
            return f"it was cut to {left} bytes"
        return _read_anything(fd, left)
    except OSError as error:
        return f"{os.strerror(error.errno or errno.EIO)}"


# Of an owner and of room the requests tell themselves; a FUSE file system may have no such times.
_TELLS_NOTHING = frozenset(
    (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP, errno.ENOSYS)
)


def _can_change(fd: int) -> bool:
    """By a new time of its last change: an ext4 that takes no writes after an error does not say
    so in statvfs(2) (from Linux 6.15 on), and a server's NFS never does."""
    try:
        os.utime(fd)
    except OSError as error:
        if error.errno == errno.EROFS:
            return False
        if error.errno not in _TELLS_NOTHING:
            raise
    return True


def disk_state(device: int) -> str:
    """The state of a SCSI disk (running, offline, ...) or NVMe controller (live, ...); else ""."""
    place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for base in (place, f"{place}/.."):  # a partition's parent is the disk
        try:
            with open(f"{base}/device/state", encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            continue
    return ""


def _read_anything(fd: int, size: int) -> str:
    """One readable block is enough: then it is not all of the storage that fails."""
    try:  # past the page cache, which answers for a device that is gone
        fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return ""  # no O_DIRECT here; it is the same file, and that is all that can be known
    try:
        return _read_one_of_three(fd, size)
    finally:
        os.close(fd)


def _read_one_of_three(fd: int, size: int) -> str:
    reason = ""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:  # aligned, for O_DIRECT
        for place in (0, size // 2, size - 1):
            try:
                os.preadv(fd, [page], place - place % mmap.PAGESIZE)
                return ""
            except OSError as error:
                reason = f"nothing can be read: {error.strerror}"
    return reason
