"""Waiting for a file to appear or change, by inotify(7)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import trio

IN_ATTRIB = 0x4
IN_MOVED_TO = 0x80
IN_CREATE = 0x100

_libc = ctypes.CDLL(None, use_errno=True)


async def path_changed(path: str, changed: Callable[[], bool]) -> None:
    """Return when `changed()`, asked now and at each event on `path` in its directory.

    Never returns where the directory is not there or the kernel has no watch to give.
    """
    directory, name = os.path.split(path)
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        await trio.sleep_forever()
    try:
        mask = IN_CREATE | IN_MOVED_TO | IN_ATTRIB
        if _libc.inotify_add_watch(fd, os.fsencode(directory or "."), mask) < 0:
            await trio.sleep_forever()
        # Asked after the watch is set, so that nothing falls between.
        while not changed():
            await _event(fd, os.fsencode(name))
    finally:
        os.close(fd)


async def _event(fd: int, name: bytes) -> None:
    """Wait for events of which one names `name`."""
    while True:
        await trio.lowlevel.wait_readable(fd)
        events = os.read(fd, 1 << 16)
        # Names end with a NUL and stand at any place: a false match only asks `changed` again.
        if name + b"\0" in events:
            return
