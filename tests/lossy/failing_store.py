"""usage: failing_store.py MOUNTPOINT COMMANDS SIZE

A FUSE file system with one file, disk.img: the medium below a loop device. Writes go to a cache
that an FSYNC makes stable. COMMANDS is a file, read at each request, of words:
  fail-fsync   FSYNC answers EIO and drops the cache, as Linux marks pages clean that it could
               not write
  fail-write   WRITE answers EIO
Beside it COMMANDS.log gets a line for each FSYNC and each failure, COMMANDS.stable is the medium.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pyfuse3
import trio

NAME = b"disk.img"
INODE = pyfuse3.ROOT_INODE + 1
LIFETIME = 1200  # seconds: a test that dies must not leave it


class Store(pyfuse3.Operations):
    def __init__(self, commands: str, size: int) -> None:
        super().__init__()
        self.commands = Path(commands)
        self.log = os.open(f"{commands}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.medium = os.open(f"{commands}.stable", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.medium, size)
        self.size = size
        self.cache = bytearray(size)
        self.dirty: list[tuple[int, int]] = []

    def told(self, word: str) -> bool:
        return word in self.commands.read_text().split()

    def say(self, text: str) -> None:
        os.write(self.log, f"{text}\n".encode())

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_mode = stat.S_IFREG | 0o600 if inode == INODE else stat.S_IFDIR | 0o700
        attributes.st_size = self.size if inode == INODE else 0
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

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        return bytes(self.cache[offset : offset + size])

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        if self.told("fail-write"):
            self.say(f"refused {offset} {len(data)}")
            raise pyfuse3.FUSEError(errno.EIO)
        self.cache[offset : offset + len(data)] = data
        self.dirty.append((offset, len(data)))
        return len(data)

    async def fsync(self, fh: int, datasync: bool) -> None:
        fails = self.told("fail-fsync")
        for offset, length in self.dirty:
            if fails:
                self.cache[offset : offset + length] = os.pread(self.medium, length, offset)
            else:
                os.pwrite(self.medium, self.cache[offset : offset + length], offset)
        self.say(f"{'dropped' if fails else 'synced'} {len(self.dirty)}")
        self.dirty.clear()
        if fails:
            raise pyfuse3.FUSEError(errno.EIO)


async def main(mountpoint: str, commands: str, size: str) -> None:
    store = Store(commands, int(size))
    pyfuse3.init(store, mountpoint, {*pyfuse3.default_options, "fsname=failing"})
    await pyfuse3.main()


signal.alarm(LIFETIME)
trio.run(main, *sys.argv[1:])
