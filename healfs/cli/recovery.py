"""healfs reconnect, healfs accept and healfs fail: what the operator may decide in an outage."""

from __future__ import annotations

import time
from typing import Any

import click

from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import connected, find
from healfs.cli.output import CliError, bad_input
from healfs.config import one_line
from healfs.control.client import Client
from healfs.control.mounts import Mount

_TIMEOUT = 15.0
_ACCEPT_SECONDS = 12.0  # a connection is made within ten seconds, or is not


@click.command(short_help="Give up a connection that hangs, and make a new one.")
@click.argument("mountpoint", type=MOUNTPOINT)
def reconnect(mountpoint: str) -> None:
    """Give up the connection of the disk at MOUNTPOINT, which hangs, and make a new one.

    What was sent on it is sent again; newer writes to the same bytes wait until it is settled.
    """
    mount = find(mountpoint)
    with connected(mount, _TIMEOUT) as client:
        client.execute("healfs-reconnect")
        now = client.execute("healfs-query-status")
    unsettled = (now.get("requests") or {}).get("unsettled", 0)
    _say(mount, f"the connection was given up; {now.get('state')}, {unsettled} unsettled")


@click.command(short_help="Go on with another disk that came back (state mismatch).")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--replay", is_flag=True, help="Write the write log to the disk that came back.")
@click.option("--drop", is_flag=True, help="Throw away what the write log holds unflushed.")
def accept(mountpoint: str, replay: bool, drop: bool) -> None:
    """Go on with another disk: the disk at MOUNTPOINT is in the state mismatch.

    Exactly one of --replay and --drop says what becomes of the writes that were answered and
    not flushed.
    """
    if replay == drop:
        bad_input("give exactly one of --replay (write the log to it) and --drop (lose the log)")
    mount = find(mountpoint)
    with connected(mount, _TIMEOUT) as client:
        client.execute("healfs-accept", {"replay": replay})
        now = _wait_accepted(client)
    if now.get("state") == "mismatch":
        raise CliError(
            f"{mount.mountpoint}: not accepted: {now.get('reason')};"
            " bring the right disk back, or one that is no smaller and takes blocks as small,"
            " and accept that"
        )
    done = "the write log is written to it" if replay else "the write log was thrown away"
    _say(mount, f"accepted; {done}; {now.get('state')}")


@click.command(short_help="Answer all requests that wait with an error, now.")
@click.argument("mountpoint", type=MOUNTPOINT)
def fail(mountpoint: str) -> None:
    """Answer all requests that wait in the disk at MOUNTPOINT with an error, now.

    The policy stays as it is: a request that comes later waits again.
    """
    mount = find(mountpoint)
    with connected(mount, _TIMEOUT) as client:
        failed = client.execute("healfs-fail")["failed"]
    _say(mount, f"requests answered with an error: {failed}")


def _wait_accepted(client: Client) -> dict[str, Any]:
    """The status when the next try to connect is over, or that of the last moment."""
    deadline = time.monotonic() + _ACCEPT_SECONDS
    while True:
        now: dict[str, Any] = client.execute("healfs-query-status")
        if now.get("state") != "mismatch" or time.monotonic() > deadline:
            return now
        time.sleep(0.05)


def _say(mount: Mount, text: str) -> None:
    click.echo(one_line(f"{mount.mountpoint}: {text}"))
