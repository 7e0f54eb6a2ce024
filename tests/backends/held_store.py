"""usage: held_store.py MOUNTPOINT LOG

A FUSE file system with one file, disk.img of 64 MiB. Reads, writes and fsyncs are held until
SIGUSR1; each adds a byte to LOG when it comes.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from typing import Any

import pyfuse3
import trio

SIZE = 64 << 20
NAME = b"disk.img"
INODE = pyfuse3.ROOT_INODE + 1


class Store(pyfuse3.Operations):
    def __init__(self, log: int) -> None:
        super().__init__()
        self.log = log
        self.released = trio.Event()
        self.data: dict[int, bytes] = {}

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_mode = stat.S_IFREG | 0o600 if inode == INODE else stat.S_IFDIR | 0o700
        attributes.st_size = SIZE if inode == INODE else 0
        attributes.st_nlink = 1
        attributes.entry_timeout = attributes.attr_timeout = 3600
        return attributes

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(INODE)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass

    async def hold(self) -> None:
        os.write(self.log, b".")
        await self.released.wait()

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        await self.hold()
        return self.data.get(offset, b"").ljust(size, b"\0")[:size]

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        await self.hold()
        self.data[offset] = bytes(data)
        return len(data)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.hold()


async def main(mountpoint: str, log: str) -> None:
    store = Store(os.open(log, os.O_WRONLY | os.O_APPEND))
    pyfuse3.init(store, mountpoint, {*pyfuse3.default_options, "fsname=held"})
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            async for _ in signals:
                store.released.set()


signal.alarm(1200)  # its own time limit: a test that dies must not leave held requests
trio.run(main, *sys.argv[1:])
