"""A process that touches the mount for a test: one command at a time, one JSON object a line.

`python -m tests.fuse.agent FILE FLAGS` opens FILE and is driven by the class Agent. The test's
own process never touches a mount.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import mmap
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEADLINE = 120.0  # seconds for what ought to take a moment
LIFETIME = 1200  # seconds; then SIGALRM ends the process

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h
PUNCH = PUNCH_HOLE | KEEP_SIZE


class Answer:
    """What a system call gave: `errno` (0: success), and its value or bytes."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.errno: int = message["errno"]
        self.value: Any = message.get("value")
        if "data" in message:
            self.value = base64.b64decode(message["data"])

    def __repr__(self) -> str:
        return f"<{errno.errorcode.get(self.errno, 'success')} {self.value!r:.60}>"


class Agent:
    """Open `file` in another process; `pread` and the rest are its system calls."""

    def __init__(self, file: Path, flags: int = os.O_RDWR) -> None:
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *(sys.executable, "-m", "tests.fuse.agent", str(file), str(flags)),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.opened = self.answer()

    def ask(self, call: str, *arguments: object) -> None:
        """Begin a call; answer() tells how it ended."""
        assert self.process.stdin is not None
        plain = [base64.b64encode(a).decode() if isinstance(a, bytes) else a for a in arguments]
        self.process.stdin.write(json.dumps([call, *plain]).encode() + b"\n")

    @property
    def answered(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def answer(self, seconds: float = DEADLINE) -> Answer:
        """The answer of the call that was begun; AssertionError after `seconds`."""
        assert self.process.stdout is not None
        line = b""
        until = time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = max(0.0, until - time.monotonic())
            ready = select.select([self.process.stdout], [], [], left)[0]
            assert ready, f"no answer within {seconds} s"
            chunk = os.read(self.process.stdout.fileno(), 1 << 20)
            assert chunk, f"the agent ended with status {self.process.wait(DEADLINE)}"
            line += chunk
        return Answer(json.loads(line))

    def do(self, call: str, *arguments: object, seconds: float = DEADLINE) -> Answer:
        self.ask(call, *arguments)
        return self.answer(seconds)

    def ok(self, call: str, *arguments: object) -> Any:
        """The value of a call that succeeds."""
        answer = self.do(call, *arguments)
        assert not answer.errno, f"{call}: {os.strerror(answer.errno)}"
        return answer.value

    def kill(self) -> None:
        """kill -9; the process may go on waiting in the kernel."""
        self.process.kill()

    def ended(self, seconds: float = DEADLINE) -> int:
        """The status of the process, reaped."""
        for pipe in self.process.stdin, self.process.stdout:
            assert pipe is not None
            pipe.close()
        return self.process.wait(seconds)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def _call(fds: dict[str, int], file: str, call: str, arguments: list[Any]) -> Any:
    fd = fds["disk"]
    match call, arguments:
        case "pread", [offset, length]:
            return os.pread(fd, length, offset)
        case "pwrite", [offset, data]:
            return os.pwrite(fd, base64.b64decode(data), offset)
        case "pwrite_from", [path, offset]:
            # The caller's buffer is a mapped file: another process can change it meanwhile.
            with open(path, "r+b") as file:
                return os.pwritev(fd, [mmap.mmap(file.fileno(), 0)], offset)
        case "write", [data]:
            return os.write(fd, base64.b64decode(data))
        case "fsync", []:
            return os.fsync(fd)
        case "fdatasync", []:
            return os.fdatasync(fd)
        case "fallocate", [mode, offset, length]:
            return _fallocate(fd, mode, offset, length)
        case "lseek", [offset, whence]:
            return os.lseek(fd, offset, whence)
        case "truncate", [size]:
            return os.ftruncate(fd, size)
        case "reopen", [flags]:
            os.close(fd)
            fds["disk"] = os.open(file, flags)
        case "namespace", [name, *rest]:
            # JSON has no tuples.
            value = getattr(os, name)(*(tuple(a) if isinstance(a, list) else a for a in rest))
            return list(value) if isinstance(value, tuple) else value
        case _:
            raise ValueError(call)
    return None


def main(file: str, flags: int) -> None:
    # Its default action ends a process that waits in FUSE, too.
    import signal

    signal.alarm(LIFETIME)
    fds: dict[str, int] = {}

    def opened() -> None:
        fds["disk"] = os.open(file, flags)

    def report(function: Any) -> None:
        message: dict[str, Any] = {"errno": 0}
        try:
            value = function()
            if isinstance(value, bytes):
                message["data"] = base64.b64encode(value).decode()
            else:
                message["value"] = value
        except OSError as exc:
            message["errno"] = exc.errno
        os.write(1, json.dumps(message).encode() + b"\n")

    report(opened)
    for line in sys.stdin:
        call, *arguments = json.loads(line)
        report(lambda call=call, arguments=arguments: _call(fds, file, call, arguments))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
