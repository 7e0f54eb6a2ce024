"""Exclusive use of an NBD export on this host: NBD has no lock, so there is a file to lock.

Another host is not seen (DESIGN.md, "Backends").
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator

from healfs.backends import nbd_uri
from healfs.backends.base import SourceError

_PLACES = ("/run/lock", tempfile.gettempdir())  # the first that can be used, by every user


@contextlib.contextmanager
def locked_export(source: str, *, read_only: bool) -> Iterator[None]:
    """Readers share an export, a writer has it alone. Raises SourceError when it is in use."""
    path = _path(source)
    fd = _lock(path, source, fcntl.LOCK_SH if read_only else fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # EAGAIN: another reader has it, too
            os.unlink(path)
        os.close(fd)


def _path(source: str) -> str:
    uri = nbd_uri.parse(source)
    server = f"{uri.host.lower()}:{uri.port}"
    if uri.socket is not None:
        server = os.path.realpath(uri.socket)
    name = hashlib.sha256(os.fsencode(f"{server}/{uri.export}")).hexdigest()[:16]
    place = next(place for place in _PLACES if os.access(place, os.W_OK | os.X_OK))
    return os.path.join(place, f"healfs-nbd-{name}")


def _lock(path: str, source: str, operation: int) -> int:
    while True:
        fd = _open(path)
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise SourceError(
                f"{source} is in use by another healfs on this host; end that first", 16
            ) from None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # what was locked is the removed file of the last holder


def _open(path: str) -> int:
    # Reading is enough to lock. O_CREAT alone would be refused for another user's file in a
    # directory that all may write to (fs.protected_regular).
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
