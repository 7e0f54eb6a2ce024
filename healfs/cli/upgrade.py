"""healfs upgrade: this version of healfs takes over a mount that another one serves."""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import click

import healfs
from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import advice, find
from healfs.cli.output import CliError
from healfs.config import one_line, shell_word
from healfs.control.mounts import Mount

_SECONDS = 60.0  # for the keeper's answer; its own limits are far below
_ANSWER_BYTES = 1 << 16


@click.command(short_help="Let this version of healfs take over, without an unmount.")
@click.argument("mountpoint", type=MOUNTPOINT)
def upgrade(mountpoint: str) -> None:
    """Let this version of healfs take over the disk at MOUNTPOINT, without an unmount.

    This version is the one that runs this command: call the healfs of the new installation. If
    it does not fit, or does not come up, the old version goes on.
    """
    mount = find(mountpoint)
    answer = _ask(mount, _this_version())
    if "error" in answer:
        raise CliError(f"{mount.mountpoint}: not upgraded: {answer['error']}")
    before = mount.version or "another version"
    click.echo(one_line(f"{mount.mountpoint}: {answer['version']} took over from {before}"))


def _this_version() -> dict[str, Any]:
    """How the keeper, which is of another version, can start this one's worker."""
    path = os.environ.get("PYTHONPATH")
    if path is not None:
        path = os.pathsep.join(os.path.abspath(entry) for entry in path.split(os.pathsep) if entry)
    return {
        "interpreter": sys.executable,
        "path": path,
        "package": os.path.realpath(os.path.dirname(healfs.__file__)),
    }


def _ask(mount: Mount, version: dict[str, Any]) -> dict[str, Any]:
    """The keeper's answer; it comes on a socket that the request brings along. Raises CliError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        ours.settimeout(_SECONDS)
        door.settimeout(_SECONDS)
        with theirs:
            try:
                door.connect(mount.door)
                request = json.dumps({"upgrade": version}).encode()
                socket.send_fds(door, [request], [theirs.fileno()])
            except PermissionError:
                raise CliError(
                    f"{mount.mountpoint}: only its owner and root may replace its program"
                ) from None
            except OSError:
                if mount.is_dead():
                    text = f"the daemon is gone; {advice(mount)}"
                else:
                    text = (
                        "the keeper is gone, and only it can start another version;"
                        f" healfs umount {shell_word(mount.mountpoint)}, then mount again"
                    )
                raise CliError(f"{mount.mountpoint}: {text}") from None
        try:
            packet = ours.recv(_ANSWER_BYTES)
        except OSError:
            raise CliError(
                f"{mount.mountpoint}: the keeper does not answer; {advice(mount)}"
            ) from None
    if not packet:
        raise CliError(f"{mount.mountpoint}: the mount was ended; see {mount.log}")
    answer: dict[str, Any] = json.loads(packet)
    return answer
