"""healfs events: what happened to a mount, also when it is one no more."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import click
from rich.text import Text

from healfs import events as history
from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import Processes
from healfs.cli.output import CliError, bad_input, console, fields
from healfs.config import one_line
from healfs.control import mounts
from healfs.control.mounts import Mount, MountsError

_LOOK_SECONDS = 0.2
_STYLES = {history.CRITICAL: "red", history.ERROR: "red", history.WARNING: "yellow"}


@click.command(short_help="Show what happened to a disk, mounted or not.")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--follow", is_flag=True, help="Go on with what happens, until it is unmounted.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def events(mountpoint: str, follow: bool, as_json: bool) -> None:
    """Show what happened to the disk at MOUNTPOINT: the last 1000 events.

    Asks no daemon, and works when it is unmounted, too.
    """
    mount, path = _find(mountpoint)
    if follow:
        if mount is None:
            bad_input(f"{mountpoint}: not mounted, so there is nothing to follow")
        _follow(mount, path, as_json)
        return
    found = history.read(path)
    _show(found, as_json)
    if not found and not as_json:
        click.echo("no events")


def _find(mountpoint: str) -> tuple[Mount | None, Path]:
    """The mount, if it is one, and the file of its history."""
    try:
        mount = mounts.find(mountpoint)
        if mount.history.parent.exists() and not os.access(mount.history.parent, os.X_OK):
            bad_input(f"{mountpoint}: only its owner reads its history; healfs status works")
        return mount, mount.history
    except MountsError as exc:
        path = mounts.events_path(mounts.canonical(mountpoint))
        if not mountpoint or not path.exists():
            bad_input(str(exc))
        return None, path


def _show(found: list[history.Event], as_json: bool) -> None:
    if as_json:
        for event in found:
            print(json.dumps(event), flush=True)
    elif found:
        console().print(fields([_row(event) for event in found]))


def _row(event: history.Event) -> tuple[str, Text]:
    when = datetime.fromisoformat(event["time"]).astimezone()
    style = _STYLES.get(history.priority(event), "")
    return f"{when:%Y-%m-%d %H:%M:%S}", Text(one_line(history.sentence(event)), style=style)


def _follow(mount: Mount, path: Path, as_json: bool) -> None:
    """By looking at the file: that goes on through the death of any worker."""
    with Processes({mount.keeper: mount.started[0]}) as keeper:
        ended, seen, last = False, (-1, -1, -1), 0
        before = history.read(path)[-1:]
        started = before[0]["sequence"] if before else 0
        while True:
            if (now := _signature(path)) != seen:
                seen = now
                new = [event for event in history.read(path) if event["sequence"] > last]
                _show(new, as_json)
                last = new[-1]["sequence"] if new else last
                if any(_is_end(event) and event["sequence"] > started for event in new):
                    return
            if ended:
                raise CliError(f"{mount.mountpoint}: the daemon is gone; see {mount.log}")
            ended = keeper.wait(_LOOK_SECONDS)


def _is_end(event: history.Event) -> bool:
    return bool(event["event"] == "HEALFS_UNMOUNTED")


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)
