"""What of this host's settings matters to every mount. Reads files, changes nothing."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from healfs.config import format_size
from healfs.doctor.finding import Finding, Level

RESEND_SINCE = (6, 9)
MAX_PAGES = 256  # of 4 KiB: requests of 1 MiB
LOG_BYTES = 64 << 20
BACKGROUND = 65535


@dataclass(frozen=True)
class Host:
    """Where to look: another root and another release are for tests."""

    root: Path = Path("/")
    release: str = field(default_factory=lambda: os.uname().release)
    uid: int = field(default_factory=os.geteuid)
    memlock: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    which: Callable[[str], str | None] = shutil.which

    def text(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None

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
            "install Linux 6.9 or later (Debian 12: apt install -t bookworm-backports "
            "linux-image-amd64)",
        )


def _fuse_device(host: Host) -> Iterator[Finding]:
    device = host.root / "dev/fuse"
    if not device.exists():
        yield Finding(
            "/dev/fuse", Level.ERROR, "it is missing: nothing can be mounted", "modprobe fuse"
        )
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding(
            "/dev/fuse", Level.ERROR, "this user may not open it", "chmod 0666 /dev/fuse (as root)"
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
                f"sysctl -w fs.fuse.{name}=0",
            )


def _message_size(host: Host) -> Iterator[Finding]:
    pages = host.number("proc/sys/fs/fuse/max_pages_limit")
    if pages is not None and pages < MAX_PAGES:
        yield Finding(
            "fs.fuse.max_pages_limit",
            Level.NOTE,
            f"requests are cut into {pages * 4} KiB: large ones are slower",
            f"sysctl -w fs.fuse.max_pages_limit={MAX_PAGES}",
        )


def _users_own(host: Host) -> Iterator[Finding]:
    """What only matters to who is not root."""
    if host.uid == 0:
        return
    if host.which("fusermount3") is None:
        yield Finding(
            "fusermount3", Level.ERROR, "users cannot mount without it", "apt install fuse3"
        )
    lines = (host.text("etc/fuse.conf") or "").splitlines()
    if "user_allow_other" not in (line.strip() for line in lines):
        yield Finding(
            "/etc/fuse.conf",
            Level.NOTE,
            "--allow-other, which libvirt needs, is for root only",
            "echo user_allow_other >> /etc/fuse.conf (as root)",
        )
    background = host.number("sys/module/fuse/parameters/max_user_bgreq")
    if background is not None and background < BACKGROUND:
        yield Finding(
            "max_user_bgreq",
            Level.WARNING,
            f"of a user's mount only {background} asynchronous requests can wait; then the kernel "
            "holds all others, reads of other ranges too",
            f"echo {BACKGROUND} > /sys/module/fuse/parameters/max_user_bgreq (as root)",
        )


def _memory_lock(host: Host) -> Iterator[Finding]:
    if host.memlock == resource.RLIM_INFINITY or host.memlock >= LOG_BYTES or host.uid == 0:
        return
    yield Finding(
        "memlock",
        Level.WARNING,
        f"{format_size(host.memlock)} may be locked, a write log has {format_size(LOG_BYTES)}: "
        "swapped out, it makes an outage of memory slow",
        "ulimit -l unlimited (limits.conf: memlock), or LimitMEMLOCK=infinity in the unit",
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
            "sysctl -w kernel.hung_task_panic=0",
        )
    else:
        yield Finding(
            "kernel.hung_task_timeout_secs",
            Level.NOTE,
            f"who waits {seconds} s for a disk is named in the kernel's log, and waits on",
        )


def _io_uring(host: Host) -> Iterator[Finding]:
    disabled = host.number("proc/sys/kernel/io_uring_disabled")
    if disabled == 2 or (disabled == 1 and host.uid != 0):
        yield Finding(
            "kernel.io_uring_disabled",
            Level.NOTE,
            "files and block devices are served by threads, which is slower",
            "sysctl -w kernel.io_uring_disabled=0",
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
            "mount -t fusectl none /sys/fs/fuse/connections",
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
    _fusectl,
)
