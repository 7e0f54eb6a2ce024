"""Who waits for an answer, and who of them is gone: a killed process is let go (promise 9).

An INTERRUPT comes for synchronous callers only, and for any signal; only a caller that is
leaving is answered, since any other would see an error that no disk gives. A killed libaio
caller stays in state D until answered, a killed io_uring caller vanishes: nobody tells of
these, so /proc is looked at now and then.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is compiled, and the keeper imports this module
    from healfs.core.request import Request

# As bits of a signal set in /proc: whose default action does not end a process.
HARMLESS = sum(
    1 << number - 1
    for number in (
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    )
)
SIGKILL = 1 << signal.SIGKILL - 1
# linux/sched.h. A thread that dumps core, or waits for the one that does, is not exiting yet.
PF_EXITING, PF_POSTCOREDUMP, PF_DUMPCORE = 0x4, 0x8, 0x200
PF_LEAVING = PF_EXITING | PF_POSTCOREDUMP | PF_DUMPCORE
PF_KTHREAD = 0x200000
REMEMBERED = 1.0  # seconds that a thread is taken for the one it was
# The thread was gone before it was looked up, is the kernel's, or is of another pid namespace.
UNKNOWN = 0


# Any other error is ours (no descriptor is free, say), and tells nothing of the process.
GONE = (errno.ENOENT, errno.ESRCH)


def _fields(path: str) -> dict[str, str]:
    with open(path, encoding="ascii", errors="replace") as status:
        pairs = (line.split(":", 1) for line in status)
        return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _flags(base: str) -> int:
    with open(f"{base}/stat", encoding="ascii", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[6])


def process_of(thread: int) -> int | None:
    """The Tgid of a thread; UNKNOWN if there is none; None if it cannot be looked at just now."""
    try:
        # A kworker sends for a loop device, and ends when it was idle: it is not who waits.
        if _flags(f"/proc/{thread}") & PF_KTHREAD:
            return UNKNOWN
        return int(_fields(f"/proc/{thread}/status")["Tgid"])
    except OSError as exc:
        # Of another user's, where /proc is mounted with hidepid=1, never.
        return UNKNOWN if exc.errno in (*GONE, errno.EPERM, errno.EACCES) else None
    except (KeyError, ValueError, IndexError):
        return UNKNOWN


def _is_ended_by_a_signal(status: dict[str, str], alone: bool) -> bool:
    """A pending signal ends it before it sees any answer. SIGKILL is pending for who was ended
    already; a signal that came behind another one, or that dumps core, waits itself.

    But not for long where it can be taken: by a debugger, by another thread, or by this one, unless
    it is in state D. Meanwhile it may be harmless: sigwait(3) has it not blocked, and waits for it.
    """
    pending, blocked, ignored, caught = (
        int(status[name], 16) for name in ("SigPnd", "SigBlk", "SigIgn", "SigCgt")
    )
    pending |= int(status["ShdPnd"], 16)
    if alone or status["State"][:1] != "D" or int(status["TracerPid"]):
        pending &= SIGKILL
    return bool(pending & ~(blocked | ignored | caught | HARMLESS))


def _thread_is_leaving(process: int, thread: str, *, alone: bool = False) -> bool:
    base = f"/proc/{process}/task/{thread}"
    try:
        if _is_ended_by_a_signal(_fields(f"{base}/status"), alone):
            return True
        return bool(_flags(base) & PF_LEAVING)
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
        self._interrupted: set[int] = set()

    def note(self, request: Request) -> int | None:
        """Look up the process now, while its thread is still there."""
        if request.process is None:
            thread = request.caller
            if time.monotonic() - self._looked > REMEMBERED:
                self._of_thread, self._looked = {}, time.monotonic()
            process = self._of_thread.get(thread)
            if process is None:
                process = process_of(thread) if thread else UNKNOWN
                if process is None:
                    return None  # at the next look
                self._of_thread[thread] = process
            request.process = process
        return request.process

    def interrupted(self, request: Request) -> None:
        """An INTERRUPT came: its thread waits for it."""
        self._interrupted.add(request.tag)

    def leaving(self, held: Mapping[int, Request]) -> list[Request]:
        """Those of the held requests whose caller is leaving."""
        self._of_thread, self._looked = {}, time.monotonic()
        self._interrupted &= held.keys()
        by_process: dict[int, list[Request]] = {}
        for request in held.values():
            if process := self.note(request):
                by_process.setdefault(process, []).append(request)
        found = []
        for process, requests in by_process.items():
            gone = is_leaving(process)
            found += [r for r in requests if gone or self._thread_is_gone(process, r)]
        return found

    def _thread_is_gone(self, process: int, request: Request) -> bool:
        """Alone: another one called execve(2), and waits until it is the only one."""
        thread = str(request.caller)
        return request.tag in self._interrupted and _thread_is_leaving(process, thread, alone=True)

    def unknown(self, held: Mapping[int, Request]) -> int:
        """How many waiting requests nobody can be named for, for status."""
        return sum(request.process == UNKNOWN for request in held.values())
