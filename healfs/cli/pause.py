"""healfs pause and healfs resume: quiet for maintenance of the backend."""

from __future__ import annotations

import time
from typing import Any

import click

from healfs.cli import exit_status
from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import advice, connected, find
from healfs.cli.output import CliError
from healfs.cli.policy_options import DURATION
from healfs.config import counted, format_duration, one_line
from healfs.control.client import CommandFailed, ControlError, connect
from healfs.control.mounts import Mount

_TIMEOUT = 5.0
_LEAST = 0.5  # seconds for an answer, however short --timeout is
_LOOK_SECONDS = 0.05


@click.command(short_help="Hold the requests, for maintenance of the backend.")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option(
    "--timeout", type=DURATION, default="30s", help="How long to wait until all is flushed. [30s]"
)
def pause(mountpoint: str, timeout: float) -> None:
    """Hold the requests to the disk at MOUNTPOINT, for maintenance of its backend.

    What is in flight is waited for, and what was answered is flushed; then this returns. When it
    cannot be, or not in time, the disk is paused nonetheless, until healfs resume.
    """
    mount = find(mountpoint)
    try:
        now = _pause(mount, time.monotonic() + timeout)
    except KeyboardInterrupt:
        text = f"interrupted; {mount.mountpoint} goes on pausing; healfs resume undoes it"
        raise CliError(text, exit_status.INTERRUPTED) from None
    state = now["pause"]
    if state is None:
        raise CliError(f"{mount.mountpoint}: resumed by somebody else meanwhile")
    waits = counted(now["requests"]["parked"], "request waits", "requests wait")
    if state["stage"] == "held" and not state["unflushed"]:
        away = f"; the backend is away ({now['reason']})" if state["away"] else ""
        click.echo(one_line(f"{mount.mountpoint}: paused; all is flushed, {waits}{away}"))
        return
    raise CliError(f"{mount.mountpoint}: {_how_far(now, timeout)}, {waits}; healfs resume ends it")


def _pause(mount: Mount, deadline: float) -> dict[str, Any]:
    """The status at its end, or when there is no point in waiting; a worker may die meanwhile."""

    def patience() -> float:
        return min(_TIMEOUT, max(_LEAST, deadline - time.monotonic()))

    while True:
        try:
            with connect(mount.control, patience()) as client:
                client.execute("stop", timeout=patience())
                while True:
                    now: dict[str, Any] = client.execute("healfs-query-status", timeout=patience())
                    state = now["pause"]
                    held = state is None or state["stage"] == "held" or state["away"]
                    if held or time.monotonic() >= deadline:
                        return now
                    time.sleep(_LOOK_SECONDS)
        except CommandFailed as exc:
            raise CliError(f"{mount.mountpoint}: {exc}") from None
        except ControlError as exc:
            if mount.is_dead() or time.monotonic() >= deadline:
                raise CliError(f"{mount.mountpoint}: {exc}; {advice(mount)}") from None
            time.sleep(_LOOK_SECONDS)


def _how_far(now: dict[str, Any], timeout: float) -> str:
    state, flying = now["pause"], now["requests"]["in_flight"]
    left = []
    if flying:
        left.append(counted(flying, "request is in flight", "requests are in flight"))
    if state["unflushed"]:
        text = counted(state["unflushed"], "answered write is", "answered writes are")
        left.append(f"{text} in the write log only")
    if state["away"]:
        what = f"paused, but the backend is away ({now['reason']})"
    elif state["stage"] == "held":
        what = "paused, but not flushed"
    else:
        done = "drained" if state["stage"] == "draining" else "flushed"
        what = f"not {done} within {format_duration(timeout)}, it goes on; new requests are held"
    return ", ".join([what, *left])


@click.command(short_help="End a pause, the operator's or the policy's.")
@click.argument("mountpoint", type=MOUNTPOINT)
def resume(mountpoint: str) -> None:
    """End the pause of the disk at MOUNTPOINT, the operator's or the policy's."""
    mount = find(mountpoint)
    with connected(mount, _TIMEOUT) as client:
        was = client.execute("healfs-query-status")["state"]
        client.execute("cont")
        now = client.execute("healfs-query-status")["state"]
    text = f"resumed; {now}" if was == "paused" else f"not paused; {now}"
    click.echo(one_line(f"{mount.mountpoint}: {text}"))


def pause_words(state: dict[str, Any]) -> str:
    """For status."""
    who = "by the operator" if state.get("by") == "operator" else "by the policy"
    if (stage := state.get("stage")) != "held":
        return f"{who}; {stage}"
    if unflushed := state.get("unflushed"):
        text = counted(unflushed, "answered write is", "answered writes are")
        return f"{who}; drained, {text} in the write log only"
    return f"{who}; drained and flushed"
