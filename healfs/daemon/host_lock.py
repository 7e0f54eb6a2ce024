"""Exclusive use of a source on this host: there is a file to lock for each.

NBD has no lock, and a file's own (see backends/locks.py) goes with the worker: in the moment
between it and its successor somebody else could take the disk, and the log would be written over
what he wrote. So this one is the keeper's, and each worker has it, too: it is held until both are
gone.

Another host is not seen (DESIGN.md, "Backends"). Standard library only: the keeper uses it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile

_FILES = "healfs-file-"  # see name_of
_TRIES = 100  # somebody may make and remove it all the time
_PLACES = ("/run/lock", tempfile.gettempdir())  # the first that can be used, by every user


def name_of(kind: str, source: str) -> str:
    """`source` has one spelling for each disk, as far as that can be had without asking it."""
    return f"healfs-{kind}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:16]}"


def acquire(name: str, *, shared: bool) -> int:
    """Readers share a source, a writer has it alone. Raises BlockingIOError when it is in use."""
    for _ in range(_TRIES):
        fd = _open(_path(name))
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as exc:
            owner = os.fstat(fd).st_uid
            os.close(fd)
            if not isinstance(exc, BlockingIOError) or not _is_overruled(name, owner):
                raise
            with contextlib.suppress(FileNotFoundError, PermissionError):
                os.unlink(_path(name))
            continue
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # what was locked is the removed file of the last holder
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _is_overruled(name: str, owner: int) -> bool:
    """Anybody may lock this name, and must not keep root's disks from being mounted: what is open
    has a file's own locks, too."""
    return os.geteuid() == 0 and owner != 0 and name.startswith(_FILES)


def release(name: str, fd: int) -> None:
    """Of the last who has it; the others close `fd`."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # EAGAIN: another reader has it, too
        os.unlink(_path(name))
    os.close(fd)


def _path(name: str) -> str:
    usable = (place for place in _PLACES if os.access(place, os.W_OK | os.X_OK))
    return os.path.join(next(usable, _PLACES[-1]), name)  # the last one's open(2) says why not


def _open(path: str) -> int:
    # Reading is enough to lock. O_CREAT alone would be refused for another user's file in a
    # directory that all may write to (fs.protected_regular). Nor may a FIFO of his stop us.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            os.fchmod(fd, 0o644)  # whatever the umask: the next user may be another
            return fd
