"""The demo's load: numbered blocks written and compared through the mounted file.

`python -m healfs.cli.demo_load FILE BYTES` runs until its standard input ends, then reads back
every block that it wrote. It reports on standard output, a JSON object a line; see Report.

A process of its own, because what waits in a mount cannot be interrupted from within. Standard
library only.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

BLOCK = 16384
THREADS = 8
REPORT_EVERY = 0.1  # seconds

_HEADER = struct.Struct("<8sQQ")
_POOL = random.Random(20210223).randbytes(1 << 20)


@dataclass
class Report:
    """Counts since the start. `time` is CLOCK_MONOTONIC, so the reader's clock too."""

    time: float = 0.0
    written: int = 0  # blocks
    compared: int = 0  # blocks read back and right while the load ran
    longest: float = 0.0  # seconds of the longest request
    errors: list[str] = field(default_factory=list)  # the first few
    error_count: int = 0
    to_verify: int = 0  # blocks, once the load is stopped
    verified: int = 0
    done: bool = False


# Moves one block at an offset; returns the bytes moved. Raises OSError.
_Call = Callable[[int, mmap.mmap, int], int]


def content(block: int, version: int) -> bytes:
    """What the block must hold: its number and version, and bytes that differ with both."""
    header = _HEADER.pack(b"healfs\0\0", block, version)
    length = BLOCK - len(header)
    start = (block * 7919 + version * 104729) % (len(_POOL) - length)
    return header + _POOL[start : start + length]


class Load:
    def __init__(self, path: str, blocks: int) -> None:
        self.path = path
        self.blocks = blocks
        self.versions: dict[int, int] = {}  # of what was acknowledged
        self.stopping = threading.Event()
        self.report = Report()
        self.lock = threading.Lock()
        self.began: dict[int, float] = {}  # thread -> when its request began

    def run(self) -> None:
        self._in_threads(self._write_and_compare, stop_at_end_of_input=True)
        self.report.to_verify = len(self.versions)
        self._in_threads(self._verify, stop_at_end_of_input=False)
        self.report.done = True
        self._print()

    def _in_threads(self, work: Callable[[int], None], *, stop_at_end_of_input: bool) -> None:
        def guarded(number: int) -> None:
            try:
                work(number)
            except OSError as exc:  # of open(); those of requests are counted where they are made
                self._error(str(exc))

        threads = [threading.Thread(target=guarded, args=(n,), daemon=True) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watched = [sys.stdin] if stop_at_end_of_input and not self.stopping.is_set() else []
            if select.select(watched, [], [], REPORT_EVERY)[0]:
                self.stopping.set()
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        with self.lock:
            self.report.time = now
            waits = [now - began for began in self.began.values()]
            self.report.longest = max([self.report.longest, *waits])
            line = json.dumps(asdict(self.report))
        print(line, flush=True)

    def _write_and_compare(self, number: int) -> None:
        """One thread; blocks are dealt out by number, so no two threads write the same one."""
        chance = random.Random(number)
        page = mmap.mmap(-1, BLOCK)  # aligned, as O_DIRECT wants it
        plain = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        synced = os.open(self.path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        count = 0
        while not self.stopping.is_set():
            block = chance.randrange(number, self.blocks, THREADS)
            version = self.versions.get(block, 0) + 1
            page[:] = content(block, version)
            count += 1
            fd = synced if count % 16 == 0 else plain
            if self._request(number, os.pwrite, fd, page, block * BLOCK):
                self.versions[block] = version
                with self.lock:
                    self.report.written += 1
            else:
                self.versions.pop(block, None)  # nobody promised what it holds now
            known = chance.randrange(number, self.blocks, THREADS)
            if known in self.versions and self._right(number, plain, page, known):
                with self.lock:
                    self.report.compared += 1
        self._request(number, _sync, plain, page, 0)

    def _verify(self, number: int) -> None:
        page = mmap.mmap(-1, BLOCK)
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        for block in [b for b in self.versions if b % THREADS == number]:
            if self._right(number, fd, page, block):
                with self.lock:
                    self.report.verified += 1

    def _right(self, number: int, fd: int, page: mmap.mmap, block: int) -> bool:
        if not self._request(number, _read, fd, page, block * BLOCK):
            return False
        version = self.versions[block]
        if page[:] == content(block, version):
            return True
        found = _HEADER.unpack_from(page)
        self._error(f"block {block}: version {version} was written, {found} was read")
        return False

    def _request(self, number: int, call: _Call, fd: int, page: mmap.mmap, offset: int) -> bool:
        began = time.monotonic()
        with self.lock:
            self.began[number] = began
        try:
            moved = call(fd, page, offset)
        except OSError as exc:
            self._error(f"{call.__name__.strip('_')} at {offset}: {exc}")
            return False
        finally:
            with self.lock:
                del self.began[number]
                self.report.longest = max(self.report.longest, time.monotonic() - began)
        if moved != BLOCK:
            self._error(f"{moved} of {BLOCK} bytes at {offset}")
        return bool(moved == BLOCK)

    def _error(self, text: str) -> None:
        with self.lock:
            self.report.error_count += 1
            if len(self.report.errors) < 3:
                self.report.errors.append(text)


def _read(fd: int, page: mmap.mmap, offset: int) -> int:
    return os.preadv(fd, [page], offset)


def _sync(fd: int, page: mmap.mmap, offset: int) -> int:
    os.fdatasync(fd)
    return BLOCK


if __name__ == "__main__":
    Load(sys.argv[1], int(sys.argv[2]) // BLOCK).run()
