"""What is reported of a new mount: to `healfs mount`, or, where that is the keeper, to people."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from typing import Any

import trio

from healfs.config import one_line
from healfs.daemon.lines import Lines

INTERRUPTED = 130  # exit status: ended before there was a mount

log = logging.getLogger("healfs.worker")


class Report:
    """`fd` is the pipe to `healfs mount`, one JSON object a line; -1 in the foreground, where it
    is said on the standard streams, and the log, which goes there too, does not repeat it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.waits = ""  # for what, before there is a mount

    def waiting(self, message: str) -> None:
        self.waits = message
        if self._fd >= 0:
            log.warning("%s", message)
        self._send(event="waiting", message=message)

    def error(self, message: str, status: int) -> None:
        if self._fd >= 0:
            log.error("%s", message)
        self._send(event="error", message=message, status=status)

    def ready(self, file: str, notes: tuple[str, ...], write_log_off: str) -> None:
        """The last report."""
        self._send(event="ready", file=file, notes=notes, write_log_off=write_log_off)
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def forsaken(self) -> None:
        """Until `healfs mount` is gone while it waits: nobody wants the mount any more."""
        if self._fd >= 0:
            with contextlib.suppress(trio.ClosedResourceError):
                # Nothing can be read from this end: what wakes is the loss of the other.
                await trio.lowlevel.wait_readable(self._fd)
                return
        await trio.sleep_forever()

    def _send(self, **message: object) -> None:
        try:
            if self._fd >= 0:
                os.write(self._fd, json.dumps(message).encode() + b"\n")
            else:
                _say(message)
        except OSError:
            pass  # it went away; the daemon stays


def _say(message: dict[str, Any]) -> None:
    if message["event"] == "ready":
        print(message["file"], file=Lines(1))
    for line in lines(message):
        print(f"healfs: {one_line(line)}", file=sys.stderr)


def lines(message: dict[str, Any]) -> list[str]:
    """What a person is told by this report."""
    match message.get("event"):
        case "waiting":
            return [f"{message.get('message', 'waiting')} (Ctrl-C ends it)"]
        case "ready":
            off = message.get("write_log_off")
            notes = [str(note) for note in message.get("notes") or ()]
            return notes + ([f"no write log: {off}"] if off else [])
        case _:
            return [str(message.get("message"))]
