"""What the shells complete. `python -m healfs.cli.completion bash|zsh|fish` prints the script.

Asked for by a keystroke: it reads the records of the mounts and asks no daemon.
"""

from __future__ import annotations

import contextlib
import os
import sys

import click
from click.shell_completion import CompletionItem, get_completion_class

from healfs.cli.config_file import DIRECTORY
from healfs.control import mounts
from healfs.control.mounts import MountsError

VARIABLE = "_HEALFS_COMPLETE"


class Mountpoint(click.ParamType[str]):
    """A mountpoint of a mount that is there, or the path of its disk's file."""

    name = "mountpoint"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with contextlib.suppress(MountsError, OSError):
            return [
                CompletionItem(mount.mountpoint, help=mount.source)
                for mount in mounts.list_mounts()
                if mount.mountpoint.startswith(incomplete)
            ]
        return []


class Source(click.ParamType[str]):
    """A path, or the name of a configuration file."""

    name = "source"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = [name.removesuffix(".toml") for name in os.listdir(DIRECTORY)]
        items = [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
        return items or [CompletionItem(incomplete, type="file")]


class Directory(click.ParamType[str]):
    """Where to mount: nothing of healfs's is there yet."""

    name = "directory"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


MOUNTPOINT = Mountpoint()


def main(shell: str) -> int:
    from healfs.cli.main import main as healfs

    chosen = get_completion_class(shell)
    if chosen is None:
        print("healfs: there are bash, zsh and fish", file=sys.stderr)
        return 2
    print(chosen(healfs, {}, "healfs", VARIABLE).source())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or ("",)))
