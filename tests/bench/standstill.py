"""How long I/O stands still when the worker dies, or is upgraded, again and again, under load.

`python -m tests.bench.standstill FILE` is the load, a process of its own. Threads of two groups
call pwrite and pread, O_DIRECT, 4 KiB, one after the other:

    elsewhere   at places that no write in flight has
    same        a write to the block that this thread has just written

A number on standard input (a time, time.monotonic) asks for the gaps since then, as a JSON
object: [until the first answer to anybody, the longest of a single caller], for each group. Only
gaps that begin soon after it count: later a caller has come round to where it was.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from healfs.control.client import ControlError
from tests.bench.load import DISK_BYTES
from tests.mounts import ROOT, HealfsMount

BLOCK = 4096
THREADS = 4  # in each group
BEFORE, AFTER = 0.5, 1.5  # seconds of load before an end, and after it, besides the settle time
DEADLINE = 60.0  # seconds
GROUPS = {  # and what the table calls them
    "elsewhere": "reads and writes elsewhere",
    "same": "a newer write to what was in flight",
}

Gaps = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Standstill:
    """Seconds, one figure an end: first answer, and longest wait of a caller, by group."""

    first: dict[str, list[float]]
    longest: dict[str, list[float]]


def kill(mount: HealfsMount) -> float:
    """Returns when (time.monotonic)."""
    worker = int(mount.status()["pids"]["worker"])
    now = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    return now


def upgrade(mount: HealfsMount) -> float:
    """To the same version, which is as good as another one. Returns when the old one, with
    nothing in flight any more, made room: a good while after the command began."""
    mount.run("upgrade", str(mount.mountpoint), timeout=DEADLINE)
    log = Path(mount.status()["log"]).read_text().splitlines()
    words = next(line for line in reversed(log) if "made room" in line).split()
    stamp = datetime.fromisoformat(f"{words[0]}T{words[1].replace(',', '.')}").timestamp()
    return time.monotonic() - (time.time() - stamp) + 0.001  # the log has whole milliseconds


def measure(mount: HealfsMount, ends: int, end: Callable[[HealfsMount], float]) -> Standstill:
    found = Standstill({group: [] for group in GROUPS}, {group: [] for group in GROUPS})
    settle = float(mount.status()["settle"])
    with _load(mount.file) as gaps:
        for _ in range(ends):
            time.sleep(BEFORE)
            began = end(mount)
            # Asked for when it is over: a status is a process of its own, and takes a core.
            time.sleep(settle + AFTER)
            _until_ready(mount)
            for group, (first, longest) in gaps(began).items():
                found.first[group].append(first)
                found.longest[group].append(longest)
    return found


def _until_ready(mount: HealfsMount) -> None:
    until = time.monotonic() + DEADLINE
    while True:
        with contextlib.suppress(ControlError, subprocess.CalledProcessError):
            if mount.status()["state"] == "ready":
                return
        if time.monotonic() > until:
            raise TimeoutError(f"not ready {DEADLINE:g} s after the worker's death")


@contextlib.contextmanager
def _load(file: Path) -> Iterator[Callable[[float], Gaps]]:
    process = subprocess.Popen(
        (
            *("setpriv", "--pdeathsig", "KILL"),
            *(sys.executable, "-m", "tests.bench.standstill", file),
        ),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def gaps(since: float) -> Gaps:
        stdin.write(f"{since}\n")
        stdin.flush()
        answer: Gaps = json.loads(stdout.readline())
        return answer

    try:
        yield gaps
    finally:
        process.kill()
        process.wait(DEADLINE)


# --- the load -----------------------------------------------------------------------------------


class Caller(threading.Thread):
    def __init__(self, file: str, number: int, *, same: bool) -> None:
        super().__init__(daemon=True)
        self.fd = os.open(file, os.O_RDWR | os.O_DIRECT)
        self.same = same
        self.number = number
        self.answers: list[float] = []

    def run(self) -> None:
        buffer = mmap.mmap(-1, BLOCK)
        part = (DISK_BYTES >> 3) // THREADS * 7  # an eighth is for those of "same"
        first = THREADS * part + self.number * BLOCK if self.same else self.number * part
        at = 0
        while True:
            os.pwrite(self.fd, buffer, first + at)
            self.answers.append(time.monotonic())
            if not self.same:
                at = (at + BLOCK) % part
                os.preadv(self.fd, [buffer], first + at)
                self.answers.append(time.monotonic())

    def since(self, start: float) -> list[float]:
        """From the last answer before `start` to the first AFTER seconds later."""
        answers = self.answers[:]
        first = max(0, bisect_right(answers, start) - 1)
        return answers[first : bisect_right(answers, start + AFTER) + 1]


def _longest_gap(times: list[float]) -> float:
    return max(after - before for before, after in pairwise(times))


def main(file: str) -> None:
    groups = {
        group: [Caller(file, number, same=group == "same") for number in range(THREADS)]
        for group in GROUPS
    }
    for caller in (caller for group in groups.values() for caller in group):
        caller.start()
    for line in sys.stdin:
        gaps = {}
        for name, group in groups.items():
            each = [caller.since(float(line)) for caller in group]
            before, after = (max(times[0] for times in each), min(times[1] for times in each))
            gaps[name] = (after - before, max(_longest_gap(times) for times in each))
        os.write(1, json.dumps(gaps).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
