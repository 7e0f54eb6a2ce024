"""The directory with one file in it: what pyfuse3 is asked. Nothing here touches the backend."""

from __future__ import annotations

import errno as e
import os
import stat
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import pyfuse3

ROOT = pyfuse3.ROOT_INODE
DISK = pyfuse3.InodeT(2)
SAVED = ("mode", "uid", "gid", "atime", "mtime", "ctime")
CACHE_SECONDS = 3600  # nothing changes behind the kernel's back


class Namespace(pyfuse3.Operations):
    """`size` in bytes. Owner, group, mode and times are changeable, and remembered."""

    def __init__(self, name: str, size: int, *, read_only: bool) -> None:
        super().__init__()
        self.name = os.fsencode(name)
        self.size = size
        self.read_only = read_only
        self.mode = 0o400 if read_only else 0o600
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.atime = self.mtime = self.ctime = time.time_ns()
        self.opened = 0  # open file descriptions
        self.on_change: Callable[[], None] = lambda: None

    def save(self) -> dict[str, int]:
        """What was changed by chmod, chown and utimes, and who is there, for a successor."""
        return {"opened": self.opened, **{name: getattr(self, name) for name in SAVED}}

    def load(self, saved: Mapping[str, int]) -> None:
        self.opened = saved.get("opened", 0)
        for name in SAVED:
            setattr(self, name, saved[name])

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        attr = pyfuse3.EntryAttributes()
        attr.st_ino = inode
        attr.generation = 0
        attr.entry_timeout = attr.attr_timeout = CACHE_SECONDS
        attr.st_uid, attr.st_gid = self.uid, self.gid
        attr.st_atime_ns, attr.st_mtime_ns, attr.st_ctime_ns = self.atime, self.mtime, self.ctime
        attr.st_blksize = 4096
        if inode == ROOT:
            attr.st_mode, attr.st_nlink = stat.S_IFDIR | 0o755, 2
        else:
            attr.st_mode, attr.st_nlink = stat.S_IFREG | self.mode, 1
            attr.st_size = self.size
            attr.st_blocks = -(-self.size // 512)
        return attr

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != self.name:
            raise pyfuse3.FUSEError(e.ENOENT)
        return self._attributes(DISK)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if fields.update_size and (inode != DISK or attr.st_size != self.size):
            raise pyfuse3.FUSEError(e.EPERM)
        if inode == DISK:
            if fields.update_mode:
                self.mode = stat.S_IMODE(attr.st_mode)
            if fields.update_uid:
                self.uid = attr.st_uid
            if fields.update_gid:
                self.gid = attr.st_gid
            if fields.update_atime:
                self.atime = attr.st_atime_ns
            if fields.update_mtime:
                self.mtime = attr.st_mtime_ns
            self.ctime = time.time_ns()
            self.on_change()
        return self._attributes(inode)

    async def open(
        self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        if self.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(e.EROFS)
        if flags & os.O_TRUNC:
            # The kernel asks for no size 0 of its own (FUSE_ATOMIC_O_TRUNC): it would take it.
            raise pyfuse3.FUSEError(e.EPERM)
        self.opened += 1
        self.on_change()
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(DISK), direct_io=True)

    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        if start_id == 0:
            pyfuse3.readdir_reply(token, self.name, self._attributes(DISK), 1)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = -(-self.size // 4096)
        data.f_bfree = data.f_bavail = data.f_ffree = data.f_favail = 0
        data.f_files = 1
        data.f_namemax = 255
        return data

    async def access(self, inode: pyfuse3.InodeT, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # default_permissions: the kernel has checked

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """close(2): nothing to do, as for a disk."""

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self.opened = max(0, self.opened - 1)
        self.on_change()

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        pass

    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        pass

    async def forget(self, inode_list: object) -> None:
        pass

    async def _refuse(self, *args: object) -> NoReturn:
        raise pyfuse3.FUSEError(e.EPERM)

    create = mkdir = mknod = symlink = link = unlink = rmdir = rename = _refuse  # type: ignore[assignment]

    async def _no_attributes(self, *args: object) -> NoReturn:
        raise pyfuse3.FUSEError(e.EOPNOTSUPP)

    setxattr = getxattr = listxattr = removexattr = _no_attributes  # type: ignore[assignment]
