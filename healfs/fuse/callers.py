"""Who waits for an answer, and who of them is gone: a killed process is let go (promise 9).

An INTERRUPT comes for synchronous callers only, and for any signal; only a caller that is
leaving is answered, since any other would see an error that no disk gives. A killed libaio
caller stays in state D until answered, a killed io_uring caller vanishes: nobody tells of
these, so /proc is looked at now and then.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is compiled, and the keeper imports this module
    from healfs.core.request import Request

SIGKILL_BIT = 1 << 8
PF_EXITING = 4
REMEMBERED = 1.0  # seconds that a thread is taken for the one it was
UNKNOWN = 0  # the thread was gone before it was looked up, or is of another pid namespace


# Any other error is ours (no descriptor is free, say), and tells nothing of the process.
GONE = (errno.ENOENT, errno.ESRCH)


def _fields(path: str) -> dict[str, str]:
    with open(path, encoding="ascii", errors="replace") as status:
        pairs = (line.split(":", 1) for line in status)
        return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def process_of(thread: int) -> int:
    """The Tgid of a thread; UNKNOWN if it is gone."""
    try:
        return int(_fields(f"/proc/{thread}/status")["Tgid"])
    except (OSError, KeyError, ValueError):
        return UNKNOWN


def _thread_is_leaving(process: int, thread: str) -> bool:
    base = f"/proc/{process}/task/{thread}"
    try:
        status = _fields(f"{base}/status")
        if (int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)) & SIGKILL_BIT:
            return True
        with open(f"{base}/stat", encoding="ascii", errors="replace") as stat:
            flags = int(stat.read().rpartition(")")[2].split()[6])
        return bool(flags & PF_EXITING)
    except OSError as exc:
        return exc.errno in GONE
    except (KeyError, ValueError, IndexError):
        return False


def is_leaving(process: int) -> bool:
    """Gone, being killed, or exiting, with all its threads."""
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError as exc:
        return exc.errno in GONE
    return all(_thread_is_leaving(process, thread) for thread in threads)


class Callers:
    """The processes behind the requests that wait."""

    def __init__(self) -> None:
        self._of_thread: dict[int, int] = {}  # forgotten soon: numbers are used again
        self._looked = 0.0

    def note(self, request: Request) -> int:
        """Look up the process now, while its thread is still there."""
        if request.process is None:
            thread = request.caller
            if time.monotonic() - self._looked > REMEMBERED:
                self._of_thread, self._looked = {}, time.monotonic()
            process = self._of_thread.get(thread)
            if process is None:
                process = process_of(thread) if thread else UNKNOWN
                self._of_thread[thread] = process
            request.process = process
        return request.process

    def leaving(self, held: Mapping[int, Request]) -> list[Request]:
        """Those of the held requests whose caller is leaving."""
        self._of_thread, self._looked = {}, time.monotonic()
        by_process: dict[int, list[Request]] = {}
        for request in held.values():
            by_process.setdefault(self.note(request), []).append(request)
        by_process.pop(UNKNOWN, None)
        return [r for process, found in by_process.items() if is_leaving(process) for r in found]

    def unknown(self, held: Mapping[int, Request]) -> int:
        """How many waiting requests nobody can be named for, for status."""
        return sum(request.process == UNKNOWN for request in held.values())
