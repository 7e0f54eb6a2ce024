"""Talking to the daemon of one mount: errors that name the mount, and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping

from healfs.cli.output import CliError, bad_input
from healfs.config import shell_word
from healfs.control import client, mounts, unflushed
from healfs.control.client import Client, CommandFailed, ControlError
from healfs.control.mounts import Mount, MountsError
from healfs.fuse.mount import TYPE, mountinfo, never_served, take_away


class RefusedError(CliError):
    """The daemon answered, with an error."""


def find(path: str) -> Mount:
    """The mount the operator names; what is none is bad input."""
    try:
        return mounts.find(path)
    except MountsError as exc:
        at = mounts.canonical(path) if path else ""
        if any(
            place in (at, os.path.dirname(at)) and kind == TYPE for place, kind, _ in mountinfo()
        ):
            bad_input(
                f"{path}: a healfs mount, but not in {mounts.directory_for(at).parent}: run this as"
                " its owner, or with HEALFS_RUNTIME_DIR as its daemon has it; umount -l is for one"
                " whose daemon is gone"
            )
        bad_input(str(exc))


@contextlib.contextmanager
def connected(mount: Mount, timeout: float) -> Iterator[Client]:
    """A client; the errors inside name the mount, and the log where the daemon failed."""
    if mount.problem:
        raise CliError(f"{mount.mountpoint}: {mount.problem}; see {mount.log}")
    try:
        with client.connect(mount.control, timeout) as connection:
            yield connection
    except CommandFailed as exc:
        raise RefusedError(f"{mount.mountpoint}: {exc}") from None
    except ControlError as exc:
        raise CliError(f"{mount.mountpoint}: {exc}; {advice(mount)}") from None


def advice(mount: Mount) -> str:
    """What to do about a daemon that is gone, or that does not answer."""
    dead = mount.is_dead()
    return about_dead(mount.mountpoint, mount.log) if dead else about_silent(mount.log)


def about_dead(mountpoint: str, log: str) -> str:
    return f"see {log}; healfs umount {shell_word(mountpoint)} clears what it left"


def about_silent(log: str) -> str:
    return f"try again (a worker that hangs is replaced), or see {log}"


def detach(mountpoint: str, connection: int | None) -> None:
    """Unmount what a dead daemon left, and nothing else. Raises CliError."""
    if connection is None:
        connection = never_served(mountpoint)
    try:
        take_away(mountpoint, connection)
    except OSError as exc:
        raise CliError(str(exc)) from None


def clear(mount: Mount) -> str:
    """Take away what a daemon left that is gone; returns what is lost with it, "" where it had
    an orderly end meanwhile."""
    claimed = mounts.claim_dead(mount.directory)
    if claimed is None:
        if not os.path.isdir(mount.directory):
            return ""
        if not os.access(mount.directory, os.R_OK):
            raise CliError(
                f"{mount.mountpoint}: the daemon is gone; its owner, or root, clears what it left"
            )
        # Nobody listened, but somebody has the lock: a mount is new, soon will be, or was.
        raise CliError(f"{mount.mountpoint}: a daemon starts or ends there just now; try again")
    try:
        lost = unflushed.loss(mount.directory)
        detach(mount.mountpoint, mount.connection)
    finally:
        claimed.clear()
    return lost


class Processes:
    """Processes of a daemon, held so that another with the same pid cannot be mistaken for one."""

    def __init__(self, started_at: Mapping[int, int]) -> None:
        """See Mount.processes."""
        self._fds: list[int] = []
        for pid, started in started_at.items():
            with contextlib.suppress(OSError):  # it is gone
                fd = os.pidfd_open(pid)
                # Asked after the pidfd was had: what has its pid now is what the pidfd is of.
                if mounts.started(pid) == started:
                    self._fds.append(fd)
                else:
                    os.close(fd)

    def send(self, number: signal.Signals) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):  # it is gone
                signal.pidfd_send_signal(fd, number)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def wait(self, seconds: float) -> bool:
        """True when all are gone within `seconds`."""
        deadline = time.monotonic() + seconds
        for fd in self._fds:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                return False
        return True
