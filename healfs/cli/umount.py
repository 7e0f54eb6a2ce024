"""healfs umount: gives nothing up silently, and is done when the processes are gone."""

from __future__ import annotations

import os
import signal
from typing import Any

import click

from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import Processes, RefusedError, clear, connected, detach, find
from healfs.cli.output import CliError, error_line
from healfs.config import format_size, spans
from healfs.control import mounts, unflushed
from healfs.control.client import CommandFailed, ControlError, connect
from healfs.control.mounts import Mount

_COMMAND_SECONDS = 8.0  # the daemon itself stops trying after 5
_FORCE_SECONDS = 4.0
_END_SECONDS = 10.0
_SOON = 1.0
_SHOWN = 8  # ranges; the log has all


@click.command(short_help="Unmount the disk and end its daemon.")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--force", is_flag=True, help="Answer what waits with an error, and say what.")
def umount(mountpoint: str, force: bool) -> None:
    """Unmount the disk at MOUNTPOINT and end its daemon.

    During an outage it tries for at most 5 s, says what waits, and leaves the mount as it is.
    """
    mount = find(mountpoint)
    if mount.is_dead():
        _clear(mount)
        return
    if force:
        _force(mount)
        return
    if not mount.mounted:
        _end_waiting(mount)
        return
    with Processes(mount.processes()) as processes:
        try:
            with connected(mount, _COMMAND_SECONDS) as client:
                _tell(mount, client.execute("healfs-umount", {"force": False}))
        except RefusedError:
            raise
        except CliError:
            if _has_ended(mount, processes):
                raise CliError(_meanwhile(mount)) from None
            raise
        if not processes.wait(_END_SECONDS):
            raise CliError(
                f"{mount.mountpoint}: unmounted, but the daemon does not end;"
                " healfs umount --force kills it"
            )


def _clear(mount: Mount) -> None:
    if not (lost := clear(mount)):
        raise CliError(_meanwhile(mount))
    error_line(f"{mount.mountpoint}: the daemon was gone already; cleared what it left; {lost}")


def _has_ended(mount: Mount, processes: Processes) -> bool:
    """Another's umount came first: an orderly end takes the directory away."""
    return processes.wait(_SOON) and not os.path.isdir(mount.directory)


def _meanwhile(mount: Mount) -> str:
    return f"{mount.mountpoint}: somebody else has unmounted it meanwhile"


def _end_waiting(mount: Mount) -> None:
    """Nothing is mounted yet, so nothing is given up."""
    with Processes(mount.processes()) as processes:
        with Processes({mount.keeper: mount.started[0]}) as keeper:
            keeper.send(signal.SIGTERM)
        if not processes.wait(_END_SECONDS):
            raise CliError(
                f"{mount.mountpoint}: the daemon does not end; healfs umount --force kills it"
            )


def _force(mount: Mount) -> None:
    if mount.problem:
        error_line(f"{mount.mountpoint}: {mount.problem}")
        _kill(mount)
        return
    with Processes(mount.processes()) as processes:
        try:
            with connect(mount.control, _FORCE_SECONDS) as client:
                _tell(mount, client.execute("healfs-umount", {"force": True}))
                if processes.wait(client.left):
                    return
        except CommandFailed as exc:
            raise CliError(f"{mount.mountpoint}: {exc}") from None
        except ControlError as exc:
            if _has_ended(mount, processes):
                raise CliError(_meanwhile(mount)) from None
            if mount.is_dead():
                _clear(mount)
                return
            error_line(f"{mount.mountpoint}: {exc}")
    _kill(mount)


def _kill(mount: Mount) -> None:
    """The daemon hangs: end it by force. Its requests are answered by the kernel, with EIO."""
    from healfs.fuse.mount import abort

    with Processes(mount.processes()) as processes:
        processes.send(signal.SIGKILL)
        abort(mount.mountpoint, mount.connection)  # a worker that cannot end keeps it open
        gone = processes.wait(_FORCE_SECONDS)
    lost = unflushed.loss(mount.directory)
    detach(mount.mountpoint, mount.connection)
    mounts.clear_dead(mount.directory)
    if not gone:
        raise CliError(
            f"{mount.mountpoint}: unmounted, but the worker (pid {mount.worker}) was killed and"
            f" cannot end: it waits in the kernel for its storage; {lost}"
        )
    error_line(f"{mount.mountpoint}: the daemon did not end by itself and was killed; {lost}")


def _tell(mount: Mount, answer: Any) -> None:
    """What is lost, and each kind of request that was answered with an error."""
    given_up = dict(answer.get("given_up") or {}) if isinstance(answer, dict) else {}
    lost = given_up.pop("unflushed", None)
    parts = [
        f"{n.get('requests', 0)} {kind.replace('_', ' ')} ({format_size(n.get('bytes', 0))})"
        for kind, n in given_up.items()
    ]
    if lost:
        count, size = lost.get("requests", 0), format_size(lost.get("bytes", 0))
        ranges = spans(lost.get("ranges") or [])
        where = f", bytes {', '.join(ranges[:_SHOWN])}" if ranges else ""
        more = f" and others, see {mount.log}" if len(ranges) > _SHOWN else ""
        error_line(
            f"{mount.mountpoint}: given up, answered but not flushed: {count} ({size}){where}{more}"
        )
    if parts:
        error_line(f"{mount.mountpoint}: given up, answered with an error: {', '.join(parts)}")
