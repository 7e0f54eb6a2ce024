"""Opening a file or block device: everything that may touch the storage, for a thread."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from healfs.backends import locks
from healfs.backends.base import Geometry, SourceError

BLKSSZGET = 0x1268  # linux/fs.h
BLKGETSIZE64 = 0x80081272
FALLOC_FL_KEEP_SIZE_PUNCH_HOLE = 0x03
# linux/magic.h: EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC; statfs(2): f_type
EXT4, XFS, BTRFS = 0xEF53, 0x58465342, 0x9123683E
NONBLOCKING = (EXT4, XFS, BTRFS)
FUSE = 0x65735546  # FUSE_SUPER_MAGIC
STATFS_SIZE = 256  # struct statfs is at most 120
MAX_HANDLE_SZ = 128  # linux/exportfs.h

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

# errno of open(2) -> what is wrong and what to do. Waiting mends none of these.
_WRONG = {
    errno.ENOENT: "no such file: {path}{creating}",
    errno.ENOTDIR: "a part of the path is no directory: {path}",
    errno.EISDIR: "{path} is a directory; name a disk image or a block device",
    errno.EACCES: "no permission to open {path}{writing}",
    errno.EPERM: "no permission to open {path}{writing}",
    errno.EROFS: "{path} is on a read-only file system; --read-only opens it; if it had an "
    "error: unmount it, fsck, mount it again",
    errno.ELOOP: "too many symbolic links: {path}",
    errno.ENAMETOOLONG: "the name is too long: {path}",
    errno.EBUSY: "{path} is in use (mounted, or held by another program); end that first",
    errno.ETXTBSY: "{path} is in use as a program or swap; end that first",
}
# Says nothing of the storage: the old descriptors, and their locks, are kept for the next attempt.
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Opened:
    fd: int
    flush_fd: int  # for FLUSH alone; see _flush_description
    locked: bool  # the file system has locks
    direct: bool  # opened with O_DIRECT
    nonblocking: bool  # on a file system whose RWF_NOWAIT holds, as far as that goes
    waits_to_write: bool  # but for writes, which it does not take with RWF_NOWAIT at all
    geometry: Geometry

    @property
    def fds(self) -> list[int]:
        return list({self.fd, self.flush_fd})

    def described(self, notes: tuple[str, ...]) -> Geometry:
        return replace(self.geometry, notes=self.geometry.notes + notes)


def close_all(fds: Iterable[int]) -> None:
    """Close them; close(2) of a file on NFS may wait for the server."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass  # a write error of the page cache: the engine has its own flush


def device_size(fd: int) -> int:
    """What the kernel believes now; it does not ask the device."""
    (size,) = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
    return int(size)


class Creation:
    """--create: a file of `size` bytes. What one attempt has made is the next one's to use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.made: tuple[int, int] | None = None  # device and inode


class Attempt:
    """One attempt to open `path`, in a thread that the loop may have to abandon.

    `locked`: the last connection had locks, and this one has to. `old` are descriptors that nothing
    is done on any more; they are closed.
    """

    def __init__(
        self,
        path: str,
        *,
        read_only: bool,
        create: Creation | None,
        wait_for_lock: bool,
        locked: bool,
        old: list[int],
    ) -> None:
        self._path = path
        self._read_only = read_only
        self._create = create
        self._wait_for_lock = wait_for_lock
        self._locked_before, self._locked = locked, True
        self._old = old
        self._lock = threading.Lock()
        self._started = self._abandoned = self._ended = False
        self._opened: Opened | None = None
        self._notes: list[str] = []

    def run(self) -> Opened:
        """SourceError: waiting does not mend it. OSError: away."""
        with self._lock:  # who gives it up sees whether it has begun
            if self._abandoned:
                raise OSError(errno.ETIMEDOUT, "too late")
            self._started = True
        opened = None
        try:
            opened = self._open()
            self._close_old()
        except SourceError:
            self._close_old()
            raise
        except OSError as error:
            if error.errno not in _OURS:
                self._close_old()
            raise self._explained(error) from None
        finally:
            self._end(opened)
        return opened

    def _end(self, opened: Opened | None) -> None:
        with self._lock:
            self._ended, self._opened = True, opened
            if not self._abandoned:
                return
        close_all([*(opened.fds if opened else ()), *self._old])

    def abandon(self) -> list[int]:
        """Nobody waits for the result. Descriptors that are the caller's now, for a thread to
        close (close(2) may wait): all of them, unless run() goes on; then it closes them."""
        with self._lock:
            self._abandoned = True
            if self._started and not self._ended:
                return []
            return [*(self._opened.fds if self._opened else ()), *self._old]

    def _explained(self, error: OSError) -> OSError:
        if error.errno not in _WRONG:
            return OSError(error.errno, f"{self._path}: {error.strerror}")
        writing = " for writing; --read-only may be enough, or mount as root"
        if self._read_only:
            writing = "; mount as the user whose it is, or as root"
        # Who waits for the right one to come back is not told to make another in its place.
        creating = "" if self._wait_for_lock else "; --create SIZE makes one"
        text = _WRONG[error.errno].format(path=self._path, writing=writing, creating=creating)
        return SourceError(text, error.errno)

    def _close_old(self) -> None:
        close_all(self._old)
        self._old = []

    def _open(self) -> Opened:
        fds: list[int] = []
        try:
            if self._create is not None:
                fds.append(self._make(self._create))
                block = False
            else:
                block = self._is_block_device(os.stat(self._path))
                if block:
                    self._close_old()  # O_EXCL excludes our own
                fds.append(os.open(self._path, self._flags(block)))
            file_system = 0 if block else _file_system(fds[0])
            if not block and not self._read_only and file_system != FUSE:
                fds.append(self._flush_description(fds[0]))
            self._exclude_others(fds[0])
            return self._describe(fds, block, file_system)
        except BaseException:
            close_all(fds)
            raise

    def _flush_description(self, fd: int) -> int:
        """Linux tells each open file description once of a page that could not be written, at
        the next fsync(2), write(2) with RWF_DSYNC, or (NFS, no space) any write(2) on it. One that
        nothing but FLUSH is done on tells FLUSH. It needs no locks: a late fsync changes no byte.
        Not on FUSE, where a server may flush what came by the same description only.
        """
        return os.open(f"/proc/self/fd/{fd}", self._flags(False))

    def _flags(self, block: bool) -> int:
        flags = os.O_CLOEXEC | (os.O_RDONLY if self._read_only else os.O_RDWR)
        return flags | os.O_DIRECT | os.O_EXCL if block else flags

    def _make(self, create: Creation) -> int:
        size = create.size
        if size <= 0:
            raise SourceError("a disk of 0 bytes is none; --create takes a size such as 10G")
        flags = os.O_CLOEXEC | os.O_RDWR
        try:
            fd = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            fd = self._made_before(create, flags)
        except FileNotFoundError:
            raise SourceError(
                f"no such directory: {os.path.dirname(self._path)}", errno.ENOENT
            ) from None
        try:
            status = os.fstat(fd)
            create.made = status.st_dev, status.st_ino
            if status.st_size < size:
                os.ftruncate(fd, size)
        except OSError as error:
            create.made = None
            os.unlink(self._path)
            close_all([fd])
            raise SourceError(
                f"cannot make {self._path} of {size} bytes: {error.strerror}",
                error.errno or errno.EIO,
            ) from None
        return fd

    def _made_before(self, create: Creation, flags: int) -> int:
        """By an attempt that was given up, or failed, after it had made it."""
        if create.made is not None:
            fd = os.open(self._path, flags)
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == create.made:
                return fd
            os.close(fd)
        raise SourceError(f"{self._path} exists; leave out --create to use it", errno.EEXIST)

    def _is_block_device(self, status: os.stat_result) -> bool:
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise SourceError(
                f"{self._path} is neither a regular file nor a block device; name one of these"
            )
        return stat.S_ISBLK(mode)

    def _exclude_others(self, fd: int) -> None:
        # The old descriptors go when the new one has the locks, so that nobody gets between.
        try:
            locks.acquire(fd, self._read_only)
            self._close_old()
            locks.check(fd, self._read_only)
        except locks.LockedError as error:
            self._refuse(str(error.strerror))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self._refuse("somebody else holds an exclusive lock")
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            if self._locked_before:  # a lock manager that is down, say
                raise OSError(
                    error.errno, f"no lock is to be had, as there was ({error.strerror})"
                ) from None
            self._locked = False
            self._notes.append(
                f"no locks on this file system ({error.strerror}): no second user is refused"
            )

    def _refuse(self, why: str) -> None:
        text = f"{self._path} is in use by QEMU or another healfs ({why}); end that first"
        if self._wait_for_lock:
            raise OSError(errno.EAGAIN, text)
        raise SourceError(text, errno.EBUSY)

    def _describe(self, fds: list[int], block: bool, file_system: int) -> Opened:
        fd = fds[0]
        status = os.fstat(fd)
        if block:
            size = device_size(fd)
            (sector,) = struct.unpack("I", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))
            identity = _device_identity(status.st_rdev)
            can_discard = _queue(status.st_rdev, "write_zeroes_max_bytes") not in ("", "0")
            # What the kernel believes: it sends such a device no flush.
            volatile = _queue(status.st_rdev, "write_cache") != "write through"
            can_zero = True  # ZERO_RANGE writes zeroes where the device has no command for it
        else:
            size, sector, volatile = status.st_size, 1, True
            identity = _file_identity(fd, status, file_system)
            can_discard = can_zero = not self._read_only and _can_punch(fd, size)
        if not size:
            if block:
                raise SourceError(f"{self._path} has no size (no medium, or not set up)")
            filling = f"; truncate -s SIZE {self._path} gives it a size"
            raise SourceError(
                f"{self._path} is empty (0 bytes){'' if self._wait_for_lock else filling}"
            )
        geometry = Geometry(
            size=size,
            minimum_block=sector,
            read_only=self._read_only,
            can_fua=True,
            can_discard=can_discard,
            can_write_zeroes=can_zero,
            volatile_cache=volatile,
            identity=identity,
            notes=tuple(self._notes),
        )
        nonblocking = block or file_system in NONBLOCKING
        waits_to_write = file_system == EXT4 and not self._read_only
        return Opened(fd, fds[-1], self._locked, block, nonblocking, waits_to_write, geometry)


def _file_system(fd: int) -> int:
    answer = ctypes.create_string_buffer(STATFS_SIZE)
    if _libc.fstatfs(fd, answer) != 0:
        # None but a server of FUSE may do without it.
        return FUSE if ctypes.get_errno() == errno.ENOSYS else 0
    return ctypes.c_ulong.from_buffer(answer).value


def _can_punch(fd: int, size: int) -> bool:
    # Beyond the end there is nothing to punch, but the file system says whether it can.
    if _fallocate(fd, FALLOC_FL_KEEP_SIZE_PUNCH_HOLE, size, 4096) == 0:
        return True
    return ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS)


def _file_identity(fd: int, status: os.stat_result, file_system: int) -> dict[str, str]:
    """Not st_dev: it changes when NFS is mounted again. Nor the handle of a file on FUSE: it holds
    a number that the server gave out at a lookup, and another one after the next mount."""
    identity = {"inode": str(status.st_ino)}
    if file_system == FUSE:
        return identity
    # struct file_handle: handle_bytes, handle_type, f_handle[]
    handle = ctypes.create_string_buffer(struct.pack("Ii", MAX_HANDLE_SZ, 0), 8 + MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    at_empty_path = 0x1000
    if _libc.name_to_handle_at(fd, b"", handle, ctypes.byref(mount_id), at_empty_path) == 0:
        length, kind = struct.unpack_from("Ii", handle)
        identity["handle"] = f"{kind}:{handle.raw[8 : 8 + length].hex()}"
    return identity


def _sysfs(device: int, name: str) -> str:
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(f"/sys/dev/block/{number}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _queue(device: int, name: str) -> str:
    # A partition has the queue of its disk.
    return _sysfs(device, f"queue/{name}") or _sysfs(device, f"../queue/{name}")


def _device_identity(device: int) -> dict[str, str]:
    partition = _sysfs(device, "partition")
    up = "../" if partition else ""
    names = {
        "wwid": ("wwid", "device/wwid", "dm/uuid"),
        "serial": ("serial", "device/serial"),
    }
    identity = {}
    for key, places in names.items():
        value = next(filter(None, (_sysfs(device, up + place) for place in places)), "")
        if value:
            identity[key] = value
    if identity and partition:
        identity["partition"] = partition
    return identity
