"""Mount, unmount and abort. Standard library only: the keeper uses it.

None of this touches the mounted file system itself, but for never_served().
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

MS_NOSUID, MS_NODEV, MS_RDONLY = 2, 4, 1
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
TYPE = "fuse.healfs"  # as mountinfo has it
FUSERMOUNT_SECONDS = 10  # a fusermount3 that takes longer is stuck
UNSERVED_SECONDS = 1.0  # for the kernel's answer in the place of a daemon that is gone

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(OSError):
    """`str(error)` is the one line for the operator."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)
        self.message = message

    def __str__(self) -> str:
        return self.message


def mount(mountpoint: str, source: str, *, allow_other: bool, read_only: bool) -> int:
    """Mount at the absolute path `mountpoint`; returns the FUSE file descriptor.

    As root by mount(2), else by fusermount3. Raises MountError.
    """
    if os.geteuid() == 0:
        return _mount_as_root(mountpoint, source, allow_other, read_only)
    return _mount_as_user(mountpoint, source, allow_other, read_only)


def _mount_as_root(mountpoint: str, source: str, allow_other: bool, read_only: bool) -> int:
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise MountError(exc.errno or 0, f"/dev/fuse: {exc.strerror}; try: modprobe fuse") from exc
    options = f"fd={fuse},rootmode=040000,user_id=0,group_id=0,default_permissions"
    if allow_other:
        options += ",allow_other"
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if read_only else 0)
    name = source.encode(errors="surrogateescape")
    path = os.fsencode(mountpoint)
    if _libc.mount(name, path, TYPE.encode(), flags, options.encode()):
        number = ctypes.get_errno()
        os.close(fuse)
        raise MountError(number, f"cannot mount {mountpoint}: {os.strerror(number)}")
    return fuse


def _fusermount(
    what: str, *arguments: str, environment: dict[str, str], pass_fds: tuple[int, ...] = ()
) -> tuple[int, str]:
    """Its exit status, and what it said on standard error, in one line. Raises MountError."""
    found = shutil.which("fusermount3")
    if not found:
        raise MountError(2, "fusermount3 is missing; install the package fuse3")
    try:
        result = subprocess.run(
            [found, *arguments],
            env={**os.environ, **environment},
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",  # it names the mountpoint
            timeout=FUSERMOUNT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise MountError(110, f"{what}: fusermount3 hangs") from None
    return result.returncode, " ".join(result.stderr.split())


def _mount_as_user(mountpoint: str, source: str, allow_other: bool, read_only: bool) -> int:
    escaped = re.sub(r"([\\,])", r"\\\1", source)
    options = f"fsname={escaped},subtype=healfs,default_permissions,nosuid,nodev"
    options += ",allow_other" if allow_other else ""
    options += ",ro" if read_only else ""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        status, said = _fusermount(
            f"cannot mount {mountpoint}",
            *("-o", options, "--", mountpoint),
            environment={"_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
        )
        if status:
            message = said or f"fusermount3: status {status}"
            raise MountError(1, f"cannot mount {mountpoint}: {message}")
        fds = array.array("i")
        _, control, _, _ = ours.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: fds.itemsize])
    if not fds:
        raise MountError(5, f"cannot mount {mountpoint}: fusermount3 passed no file descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(
    mountpoint: str, connection: int | None, *, lazy: bool = False, moved: bool = False
) -> None:
    """Ours, of that connection; what somebody else has mounted there is left alone.

    `moved`: wherever it is now. Only while it is served: the number of a connection that is gone
    may be another's.

    Raises MountError: errno EBUSY (16) when somebody has the file open and not lazy.
    """
    if moved and connection not in _connections_at(mountpoint):
        mountpoint = [mountpoint, *places_of(connection)][-1]
    if not is_ours(mountpoint, connection):
        what = "something else is mounted over it; unmount that first"
        if not is_mounted(mountpoint):
            what = "it is not mounted there any more; the daemon ends when nobody uses it elsewhere"
        raise MountError(22, f"cannot unmount {mountpoint}: {what}")
    if os.geteuid() == 0:
        flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
        if _libc.umount2(os.fsencode(mountpoint), flags):
            number = ctypes.get_errno()
            raise MountError(number, f"cannot unmount {mountpoint}: {os.strerror(number)}")
        return
    status, said = _fusermount(
        f"cannot unmount {mountpoint}",
        *("-u", *(["-z"] if lazy else []), "--", mountpoint),
        environment={"LC_ALL": "C"},
    )
    if status:
        number = errno.EBUSY if "busy" in said else errno.EPERM
        raise MountError(number, f"cannot unmount {mountpoint}: {said}")


def places_of(connection: int | None) -> list[str]:
    """Where healfs mounts of that connection are, the newest last."""
    return [place for place, kind, minor in mountinfo() if kind == TYPE and minor == connection]


def is_connected(fuse: int) -> bool:
    """Whether it is mounted somewhere still: a bind mount, another mount namespace, a file that is
    open. As long as it is, the connection's number is no other's."""
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def never_served(mountpoint: str) -> int | None:
    """The connection of the healfs mount on top there that nobody has ever served: its keeper was
    killed while it mounted, and has told nobody the number. One that is served sees a stat(2)."""
    on_top = [(kind, minor) for place, kind, minor in mountinfo() if place == mountpoint][-1:]
    if not on_top or on_top[0][0] != TYPE:
        return None
    errors: list[int | None] = []

    def ask() -> None:
        try:
            os.stat(mountpoint)
        except OSError as exc:
            errors.append(exc.errno)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(UNSERVED_SECONDS)
    return on_top[0][1] if errors == [errno.ENOTCONN] else None


def take_away(mountpoint: str, connection: int | None) -> bool:
    """Unmount what a dead daemon left, and nothing else; whether it was there. Raises OSError."""
    if not is_ours(mountpoint, connection):
        return False
    try:
        unmount(mountpoint, connection, lazy=True)
    except OSError:
        if is_ours(mountpoint, connection):
            raise
    return True


def abort(mountpoint: str, connection: int | None, *, connected: bool = False) -> None:
    """Have the kernel answer everybody with ECONNABORTED, whatever the daemon does. The number of
    a connection that is gone may be another's: it must be `connected` (see is_connected), or
    mounted there, be it below another."""
    if connection is None or not (connected or connection in _connections_at(mountpoint)):
        return
    with contextlib.suppress(OSError):
        file = os.open(f"/sys/fs/fuse/connections/{connection}/abort", os.O_WRONLY)
        try:
            os.write(file, b"1")
        finally:
            os.close(file)


def mountinfo() -> Iterator[tuple[str, str, int]]:
    """What is mounted, the newest last: where, the file system's type, the device's minor.
    The kernel is asked, not the mounts."""
    # It escapes a newline in a name, and no other end of a line that Python knows.
    names = sys.getfilesystemencoding()
    with open(
        "/proc/self/mountinfo", encoding=names, errors="surrogateescape", newline="\n"
    ) as table:
        for line in table:
            fields = line.split(" ")
            place = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
            yield place, fields[fields.index("-") + 1], int(fields[2].split(":")[1])


def _connections_at(mountpoint: str) -> list[int | None]:
    """Of all that is mounted there, the one on top last; None: no FUSE file system."""
    return [
        minor if kind in ("fuse", TYPE) else None
        for place, kind, minor in mountinfo()
        if place == mountpoint
    ]


def connection_of(mountpoint: str) -> int | None:
    """N of /sys/fs/fuse/connections/N: the device's minor; None: no FUSE mount is on top there."""
    return (_connections_at(mountpoint) or [None])[-1]


def is_ours(mountpoint: str, connection: int | None) -> bool:
    """Whether the mount of that connection is the one on top there."""
    return connection is not None and connection_of(mountpoint) == connection


def is_mounted(mountpoint: str) -> bool:
    """Whether anything is mounted there."""
    return any(place == mountpoint for place, _, _ in mountinfo())
