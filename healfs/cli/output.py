"""How the CLI speaks: one style of table, one shape of error."""

from __future__ import annotations

import errno
import json
import sys
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from healfs.cli import exit_status
from healfs.config import one_line, os_error_words


class CliError(Exception):
    """Ends the command: `message` goes to standard error in one line, `status` to the shell."""

    def __init__(self, message: str, status: int = exit_status.FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


def bad_input(message: str) -> NoReturn:
    raise CliError(message, exit_status.BAD_INPUT)


def error_line(message: str) -> None:
    print(f"healfs: {one_line(message)}", file=sys.stderr, flush=True)


_NEXT = {
    errno.EACCES: "run this as the user whose it is, or as root",
    errno.EPERM: "run this as the user whose it is, or as root",
    errno.ENOENT: "make it, or correct the path",
    errno.EISDIR: "give a file",
    errno.ENOSPC: "make room there",
    errno.EROFS: "the file system is read-only there",
}


def os_error(exc: OSError) -> str:
    """What the system refused, and what to do."""
    if exc.errno == errno.ENOENT and not exc.filename:  # of getcwd(2)
        return "the current directory is gone; go to another one, or give absolute paths"
    text = os_error_words(exc)
    return f"{text}; {_NEXT[exc.errno]}" if exc.errno in _NEXT else text


def console() -> Console:
    """Standard output; 80 columns where it is no terminal."""
    return Console(highlight=False)


_STATE_STYLES = {
    "ready": "green",
    "mounted": "green",
    "waiting": "yellow",
    "connecting": "yellow",
    "stalled": "yellow",
    "replaying": "yellow",
    "paused": "yellow",
    "no answer": "red",
    "no worker": "red",
    "mismatch": "red",
    "faulted": "red",
    "dead": "red",
}


def state_text(state: str) -> Text:
    return Text(one_line(state), style=_STATE_STYLES.get(state, ""))


def cell(value: object) -> Text:
    """Text as it is: what a path says is never markup."""
    return value if isinstance(value, Text) else Text(one_line(str(value)))


def table(*columns: str) -> Table:
    """The style of every table that has a header."""
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        result.add_column(name, overflow="fold")
    return result


def fields(rows: list[tuple[str, object]]) -> Table:
    """The style of every list of names and values."""
    result = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows:
        result.add_row(name, cell(value))
    return result


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
