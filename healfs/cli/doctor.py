"""healfs doctor: what on this host would break the promises, and what mends it."""

from __future__ import annotations

from dataclasses import asdict, replace

import click
from rich.text import Text

from healfs.cli import exit_status
from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import find
from healfs.cli.output import cell, console, print_json, table
from healfs.config import one_line, shell_word
from healfs.control.client import ControlError, connect
from healfs.control.mounts import Mount
from healfs.doctor import disk, guests, host
from healfs.doctor.finding import Finding, Level

_TIMEOUT = 4.0
_STYLES = {Level.OK: "green", Level.NOTE: "", Level.WARNING: "yellow", Level.ERROR: "red"}


@click.command(short_help="Look for what would break the promises.")
@click.argument("mountpoint", type=MOUNTPOINT, required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys are stable.")
def doctor(mountpoint: str | None, as_json: bool) -> int:
    """Look for what would break the promises: on this host, and of the disk at MOUNTPOINT.

    Each finding that is not ok comes with the command that mends it. Exit status 1 when a promise
    does not hold.
    """
    found, here = [], host.Host()
    if mountpoint is not None:
        found = _of_mount(find(mountpoint))
        here = replace(here, memlock=None)
    found += host.examine(here)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        _print(found)
    failed = any(finding.level is Level.ERROR for finding in found)
    return exit_status.FAILURE if failed else exit_status.SUCCESS


def _of_mount(mount: Mount) -> list[Finding]:
    found = guests.examine(mount.file, mount.mountpoint)
    try:
        with connect(mount.control, _TIMEOUT) as client:
            return disk.examine(client.execute("healfs-query-status")) + found
    except ControlError as exc:
        mend = f"less {shell_word(mount.log)}"
        if mount.is_dead():
            mend = f"healfs umount {shell_word(mount.mountpoint)} # clears what it left"
        return [Finding("daemon", Level.ERROR, str(exc), mend), *found]


def _print(found: list[Finding]) -> None:
    result = table("", "CHECK", "FINDING")
    for finding in found:
        style = _STYLES[finding.level]
        result.add_row(Text(finding.level, style), cell(finding.check), cell(finding.text))
    console().print(result)
    checks: dict[str, list[str]] = {}
    for finding in found:
        if finding.mend and finding.check not in (named := checks.setdefault(finding.mend, [])):
            named.append(finding.check)
    # To be pasted into a shell: no line is broken, and what is no command is a comment.
    for mend, named in checks.items():
        click.echo(f"\n# {one_line(', '.join(named))}\n{one_line(mend)}")
