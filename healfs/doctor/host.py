"""What of this host's settings matters to every mount. Reads files, changes nothing."""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from healfs import compiled
from healfs.config import format_size
from healfs.doctor.finding import Finding, Level

RESEND_SINCE = (6, 9)
MAX_PAGES = 256  # of 4 KiB: requests of 1 MiB
LOG_BYTES = (64 << 20) + (1040 << 10)  # of the default --log-size and --log-entries
BACKGROUND = 65535


@dataclass(frozen=True)
class Host:
    """Where to look: another root and another release are for tests.

    `memlock` is None where a mount is there to say itself whether its memory is locked.
    """

    root: Path = Path("/")
    release: str = field(default_factory=lambda: os.uname().release)
    uid: int = field(default_factory=os.geteuid)
    memlock: int | None = field(
        default_factory=lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    )
    groups: tuple[int, ...] = field(default_factory=lambda: (os.getegid(), *os.getgroups()))
    which: Callable[[str], str | None] = shutil.which
    plain: str = compiled.why_plain

    def as_root(self, command: str) -> str:
        return command if self.uid == 0 else f"sudo {command}"

    def write(self, text: str, path: str, append: bool = False) -> str:
        """The command that does it; the shell's own > would not be root's."""
        return f"echo {text} | {self.as_root('tee -a' if append else 'tee')} {path}"

    def sysctl(self, setting: str) -> str:
        return self.as_root(f"sysctl -w {setting}")

    def text(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None

    def may_read(self, path: str) -> bool:
        """What is not there has nothing to be read."""
        there = self.root / path
        return not os.path.exists(there) or os.access(there, os.R_OK)

    def is_setuid(self, program: str) -> bool:
        try:
            return bool((self.root / program.lstrip("/")).stat().st_mode & stat.S_ISUID)
        except OSError:
            return False

    def number(self, path: str) -> int | None:
        """None: there is no such setting here."""
        text = self.text(path)
        return int(text) if text is not None and re.fullmatch(r"-?[0-9]+", text) else None


def examine(host: Host) -> list[Finding]:
    return [finding for check in _CHECKS for finding in check(host)]


def _kernel(host: Host) -> Iterator[Finding]:
    match = re.match(r"([0-9]+)\.([0-9]+)", host.release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version >= RESEND_SINCE:
        yield Finding("kernel", Level.OK, f"Linux {host.release} survives the worker's death")
    else:
        yield Finding(
            "kernel",
            Level.ERROR,
            f"Linux {host.release} cannot send unanswered requests again: the death of the worker "
            "ends the mount",
            host.as_root("apt-get install -t bookworm-backports linux-image-amd64")
            + " # of Debian 12: any Linux from 6.9 on; boot it then",
        )


def _fuse_device(host: Host) -> Iterator[Finding]:
    device = host.root / "dev/fuse"
    if not device.exists():
        yield Finding(
            "/dev/fuse",
            Level.ERROR,
            "it is missing: nothing can be mounted",
            host.as_root("modprobe fuse"),
        )
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding(
            "/dev/fuse",
            Level.ERROR,
            "this user may not open it",
            host.as_root("chmod 0666 /dev/fuse"),
        )
    else:
        yield Finding("/dev/fuse", Level.OK, "it can be opened")


def _request_timeouts(host: Host) -> Iterator[Finding]:
    for name in ("default_request_timeout", "max_request_timeout"):
        if host.number(f"proc/sys/fs/fuse/{name}"):
            yield Finding(
                f"fs.fuse.{name}",
                Level.ERROR,
                "the kernel ends a mount whose request waits longer, and an outage is that",
                host.sysctl(f"fs.fuse.{name}=0"),
            )


def _message_size(host: Host) -> Iterator[Finding]:
    pages = host.number("proc/sys/fs/fuse/max_pages_limit")
    if pages is not None and pages < MAX_PAGES:
        yield Finding(
            "fs.fuse.max_pages_limit",
            Level.NOTE,
            f"requests are cut into {pages * 4} KiB: large ones are slower",
            host.sysctl(f"fs.fuse.max_pages_limit={MAX_PAGES}"),
        )


def _users_own(host: Host) -> Iterator[Finding]:
    """What only matters to who is not root."""
    if host.uid == 0:
        return
    program = host.which("fusermount3")
    if program is None:
        yield Finding(
            "fusermount3",
            Level.ERROR,
            "users cannot mount without it",
            host.as_root("apt-get install fuse3"),
        )
    elif not host.is_setuid(program):
        yield Finding(
            "fusermount3",
            Level.ERROR,
            f"{program} is not setuid root: users cannot mount with it",
            host.as_root(f"chmod u+s {program}"),
        )
    lines = (host.text("etc/fuse.conf") or "").splitlines()
    if not host.may_read("etc/fuse.conf"):
        yield Finding(
            "/etc/fuse.conf",
            Level.NOTE,
            "this user may not read it: whether --allow-other, which libvirt needs, is for root "
            "only is not known",
            host.as_root("grep user_allow_other /etc/fuse.conf"),
        )
    elif "user_allow_other" not in (line.partition("#")[0].strip() for line in lines):
        yield Finding(
            "/etc/fuse.conf",
            Level.NOTE,
            "--allow-other, which libvirt needs, is for root only",
            host.write("user_allow_other", "/etc/fuse.conf", append=True),
        )
    background = host.number("sys/module/fuse/parameters/max_user_bgreq")
    if background is not None and background < BACKGROUND:
        yield Finding(
            "max_user_bgreq",
            Level.WARNING,
            f"of a user's mount only {background} asynchronous requests can wait; then the kernel "
            "holds all others, reads of other ranges too",
            host.write(str(BACKGROUND), "/sys/module/fuse/parameters/max_user_bgreq"),
        )


def _memory_lock(host: Host) -> Iterator[Finding]:
    if host.memlock is None or host.uid == 0:
        return
    if host.memlock == resource.RLIM_INFINITY or host.memlock >= LOG_BYTES:
        return
    yield Finding(
        "memlock",
        Level.WARNING,
        f"{format_size(host.memlock)} may be locked, a write log needs {format_size(LOG_BYTES)} "
        "(the default --log-size): it may be swapped out, and a kill of the worker then may be "
        "an error of the guest",
        host.write("'* - memlock unlimited'", "/etc/security/limits.d/healfs.conf")
        + " # log in again then",
    )


def _hung_tasks(host: Host) -> Iterator[Finding]:
    seconds = host.number("proc/sys/kernel/hung_task_timeout_secs")
    if not seconds:
        return
    if host.number("proc/sys/kernel/hung_task_panic"):
        yield Finding(
            "kernel.hung_task_panic",
            Level.ERROR,
            f"a process that waits {seconds} s for a disk makes this host panic",
            host.sysctl("kernel.hung_task_panic=0"),
        )
    else:
        yield Finding(
            "kernel.hung_task_timeout_secs",
            Level.NOTE,
            f"who waits {seconds} s for a disk is named in the kernel's log, and waits on",
            host.sysctl("kernel.hung_task_timeout_secs=0"),
        )


def _io_uring(host: Host) -> Iterator[Finding]:
    disabled = host.number("proc/sys/kernel/io_uring_disabled")
    privileged = host.uid == 0 or host.number("proc/sys/kernel/io_uring_group") in host.groups
    if disabled == 2 or (disabled == 1 and not privileged):
        yield Finding(
            "kernel.io_uring_disabled",
            Level.NOTE,
            "files and block devices are served by threads, which is slower",
            host.sysctl("kernel.io_uring_disabled=0"),
        )


def _compiled(host: Host) -> Iterator[Finding]:
    if not host.plain:
        yield Finding("compiled modules", Level.OK, "they are used")
    else:
        yield Finding(
            "compiled modules",
            Level.NOTE,
            f"plain Python is used, which is slower: {host.plain}",
            "# in a checkout: make setup; else install healfs again, with a C compiler",
        )


def _fusectl(host: Host) -> Iterator[Finding]:
    if not (host.root / "sys/fs/fuse/connections").is_dir() or not any(
        " /sys/fs/fuse/connections " in line
        for line in (host.text("proc/self/mountinfo") or "").splitlines()
    ):
        yield Finding(
            "fusectl",
            Level.WARNING,
            "umount --force cannot abort a mount whose worker hangs in the kernel",
            host.as_root("mount -t fusectl none /sys/fs/fuse/connections"),
        )


_CHECKS = (
    _kernel,
    _fuse_device,
    _request_timeouts,
    _message_size,
    _users_own,
    _memory_lock,
    _hung_tasks,
    _io_uring,
    _compiled,
    _fusectl,
)
