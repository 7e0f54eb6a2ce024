"""The options of the write log and of unsettled attempts, and what they may be."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

import click

from healfs.cli.output import CliError, bad_input
from healfs.cli.policy_options import BYTES, DURATION
from healfs.config import format_size

_F = TypeVar("_F", bound=Callable[..., Any])

MAXIMUM_LOG = 16 << 30
MAXIMUM_ENTRIES = 1 << 20
MAXIMUM_SETTLE = 3600.0
_SHELL = "/bin/sh"  # as daemon/fencing.py runs it
_SHELL_SECONDS = 10.0
_EXPANDED = set("$`~*?[]=")  # in a first word: only the shell knows what comes of it
_PUNCTUATION = set("();<>|&")

_OPTIONS = [
    click.option(
        "--log-size",
        type=BYTES,
        default="64M",
        help="Room for the payloads of the write log, in memory. [64M]",
    ),
    click.option(
        "--log-entries",
        type=int,
        metavar="N",
        default=16384,
        help="Room for so many requests in the write log. [16384]",
    ),
    click.option(
        "--settle",
        type=DURATION,
        help="How long a write of a lost connection may still reach the disk. [5s for NBD, 0 for "
        "files]",
    ),
    click.option(
        "--fence",
        metavar="COMMAND",
        help="Let this command decide instead: when it succeeds, nothing of lost connections "
        "reaches the disk any more. [none]",
    ),
]


def log_options(function: _F) -> _F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of MountConfig that these options are. Raises CliError."""
    settle, fence = options["settle"], options["fence"]
    if settle is not None and settle > MAXIMUM_SETTLE:
        bad_input("--settle: must be from 0 to 1h")
    if fence is not None:
        if settle is not None:
            bad_input("--settle does not go with --fence: the fence decides")
        _check_fence(fence)
    return {
        "log_size": _log_size(options["log_size"]),
        "log_entries": _log_entries(options["log_entries"]),
        "settle": settle,
        "fence": fence,
    }


def _log_size(size: int) -> int:
    """In whole pages."""
    from healfs.core.ring import PAGE
    from healfs.fuse.wire import MAX_WRITE

    least = 2 * (MAX_WRITE + PAGE)  # what PayloadRing asks for: two of the longest messages
    if size < least:
        bad_input(
            f"--log-size: {format_size(size)} is too small for one request; "
            f"the least is {least} bytes, so 3M will do"
        )
    if size > MAXIMUM_LOG:
        bad_input(f"--log-size: must be at most {format_size(MAXIMUM_LOG)}: it is memory")
    return -(-size // PAGE) * PAGE


def _log_entries(entries: int) -> int:
    from healfs.core.writelog import RESERVED

    least = 2 * RESERVED  # of them, RESERVED are for unsettled attempts
    if not least <= entries <= MAXIMUM_ENTRIES:
        bad_input(f"--log-entries: must be from {least} to {MAXIMUM_ENTRIES}")
    return entries


def _check_fence(command: str) -> None:
    """A typing error is found now, not in the first outage."""
    syntax = _shell("-n", "-c", command)
    if syntax.returncode:
        bad_input(f"--fence: {syntax.stderr.strip() or 'the shell cannot read it'}")
    word = _first_word(command)
    if word is None:
        bad_input("--fence: the command is empty")
    if not word or _EXPANDED & set(word):
        return
    if "/" in word:
        if not word.startswith("/"):
            bad_input(f"--fence: {word}: the daemon runs in /; write the absolute path")
        found = shutil.which(word) is not None
    else:  # a builtin or a keyword will do, too
        found = not _shell("-c", 'command -v -- "$1"', "sh", word).returncode
    if not found:
        bad_input(f"--fence: {word}: no such command")


def _first_word(command: str) -> str | None:
    """The program's name; "" where the shell's syntax comes first, None where there is nothing."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        word = lexer.get_token()
    except ValueError:
        return ""  # the shell reads more than shlex does
    return "" if word and _PUNCTUATION & set(word) else word


def _shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [_SHELL, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SHELL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # a directory of PATH hangs
        text = f"--fence: {_SHELL} does not find the command within {_SHELL_SECONDS:g} s;"
        raise CliError(f"{text} write its absolute path, or try again") from None
