"""usage: checker.py FILE BLOCKS THREADS SEED

Threads write numbered blocks to FILE at random (O_DIRECT) and remember what was answered and
what was flushed. Each block carries its number, its version and a checksum.

Commands on standard input, a JSON list a line; each gets one object:
  progress     counts: writes, flushes, errors
  check        with the writers stopped meanwhile, each block must be the newest answered
  flush        the same, after an fsync, and everything counts as flushed
  stop         end the writers
  stable PATH  each block of this file must be a version that was written, and no older than
               what was flushed; it is read while the writers run, so let nothing change it
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import zlib
from typing import Any

BLOCK = 4096
HEAD = struct.Struct("<IQQ")  # checksum of the rest, number, version
RUN = 4  # blocks of the longest write
LIFETIME = 2400  # seconds
EMPTY = bytes(BLOCK)


def block(number: int, version: int) -> bytes:
    rest = struct.pack("<QQ", number, version)
    rest += struct.pack("<Q", number * 0x9E3779B97F4A7C15 + version & (1 << 64) - 1) * 510
    return struct.pack("<I", zlib.crc32(rest[: BLOCK - 4])) + rest[: BLOCK - 4]


def version_of(number: int, data: bytes) -> int:
    """-1: it is none that anybody wrote."""
    if data == EMPTY:
        return 0
    checksum, found, version = HEAD.unpack_from(data)
    if checksum != zlib.crc32(data[4:]) or found != number:
        return -1
    return int(version)


class Checker:
    def __init__(self, path: str, blocks: int) -> None:
        self.path = path
        self.blocks = blocks
        self.asked = [0] * blocks
        self.answered = [0] * blocks
        self.flushed = [0] * blocks
        self.busy: set[int] = set()
        self.condition = threading.Condition()
        self.paused = self.stopped = False
        self.writing = 0  # threads in a write or fsync
        self.counts = {"writes": 0, "flushes": 0, "synchronous": 0}
        self.errors: list[str] = []

    # --- writers ----------------------------------------------------------------------------

    def write_on(self, seed: int) -> None:
        rng = random.Random(seed)
        buffer = mmap.mmap(-1, RUN * BLOCK)
        plain = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        synchronous = os.open(self.path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        while self.enter():
            try:
                dice = rng.random()
                if dice < 0.01:
                    self.flush(plain)
                else:
                    self.write(rng, buffer, plain, synchronous, dice < 0.03)
            except OSError as exc:
                self.errors.append(str(exc))
                return
            finally:
                self.leave()

    def enter(self) -> bool:
        with self.condition:
            self.condition.wait_for(lambda: not self.paused or self.stopped)
            self.writing += not self.stopped
            return not self.stopped

    def leave(self) -> None:
        with self.condition:
            self.writing -= 1
            self.condition.notify_all()

    def write(
        self, rng: random.Random, buffer: mmap.mmap, plain: int, synchronous: int, stable: bool
    ) -> None:
        with self.condition:
            first = rng.randrange(self.blocks)
            run = range(first, min(self.blocks, first + rng.randint(1, RUN)))
            if not self.busy.isdisjoint(run):
                return  # two writes to one block at a time: which is the newer one?
            self.busy.update(run)
            for number in run:
                self.asked[number] += 1
        for index, number in enumerate(run):
            buffer[index * BLOCK : (index + 1) * BLOCK] = block(number, self.asked[number])
        length = len(run) * BLOCK
        with memoryview(buffer) as view:
            fd = synchronous if stable else plain
            done = os.pwritev(fd, [view[:length]], first * BLOCK)
        with self.condition:
            if done != length:
                self.errors.append(f"short write of {done} bytes")
            for number in run:
                self.answered[number] = self.asked[number]
                if stable:
                    self.flushed[number] = self.asked[number]
            self.busy.difference_update(run)
            self.counts["writes"] += 1
            self.counts["synchronous"] += stable

    def flush(self, fd: int) -> None:
        with self.condition:
            covered = list(self.answered)
        os.fsync(fd)
        with self.condition:
            self.flushed = [max(*pair) for pair in zip(self.flushed, covered, strict=True)]
            self.counts["flushes"] += 1

    # --- what it finds ----------------------------------------------------------------------

    def check(self) -> list[str]:
        with self.condition:
            self.paused = True
            self.condition.wait_for(lambda: not self.writing)
        try:
            return [
                f"block {number} is {self.name(found)}, version {self.answered[number]} answered"
                for number, found in self.read(self.path, os.O_DIRECT)
                if found != self.answered[number]
            ]
        finally:
            with self.condition:
                self.paused = False
                self.condition.notify_all()

    def stable(self, path: str) -> list[str]:
        with self.condition:
            flushed, asked = list(self.flushed), list(self.asked)
        return [
            f"block {number} is {self.name(found)}, version {flushed[number]} flushed"
            for number, found in self.read(path, 0)
            if not flushed[number] <= found <= asked[number]
        ]

    @staticmethod
    def name(found: int) -> str:
        return "torn" if found < 0 else f"version {found}"

    def read(self, path: str, flags: int) -> list[tuple[int, int]]:
        step = 64
        buffer = mmap.mmap(-1, step * BLOCK)
        fd = os.open(path, os.O_RDONLY | flags)
        found = []
        try:
            for first in range(0, self.blocks, step):
                count = min(step, self.blocks - first)
                with memoryview(buffer) as view:
                    os.preadv(fd, [view[: count * BLOCK]], first * BLOCK)
                for i in range(count):
                    data = buffer[i * BLOCK : (i + 1) * BLOCK]
                    found.append((first + i, version_of(first + i, data)))
        finally:
            os.close(fd)
        return found

    def command(self, name: str, *arguments: str) -> dict[str, Any]:
        match name, arguments:
            case "progress", ():
                return {**self.counts, "errors": self.errors}
            case "check", ():
                return {"lost": self.check(), "errors": self.errors}
            case "flush", ():
                with self.condition:
                    self.paused = True
                    self.condition.wait_for(lambda: not self.writing)
                fd = os.open(self.path, os.O_RDWR)
                self.flush(fd)
                os.close(fd)
                return {"lost": self.check(), "errors": self.errors}
            case "stop", ():
                with self.condition:
                    self.stopped = True
                    self.condition.notify_all()
                    self.condition.wait_for(lambda: not self.writing)
                return {"errors": self.errors}
            case "stable", (path,):
                return {"lost": self.stable(path)}
        raise ValueError(name)


def main(path: str, blocks: str, threads: str, seed: str) -> None:
    signal.alarm(LIFETIME)
    checker = Checker(path, int(blocks))
    for number in range(int(threads)):
        arguments = (int(seed) * 1000 + number,)
        threading.Thread(target=checker.write_on, args=arguments, daemon=True).start()
    for line in sys.stdin:
        answer = checker.command(*json.loads(line))
        os.write(1, json.dumps(answer).encode() + b"\n")
    os._exit(0)  # its threads may wait in the kernel for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
