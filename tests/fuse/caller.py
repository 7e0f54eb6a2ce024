"""A process with many requests in flight at once, and an end of its own.

`python -m tests.fuse.caller FILE WAY COUNT` writes COUNT blocks to FILE by one of WAYS, without
waiting for any, says "submitted", and exits when its standard input ends; told "exec" there, a
second thread executes another program.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import select
import struct
import subprocess
import sys
import threading
from pathlib import Path

from healfs.backends.uring import IORING_OP_WRITE, Operation, Ring

ROOT = Path(__file__).parents[2]
WAYS = ("libaio", "io_uring", "io_uring workers", "threads")
BLOCK = 4096
LIFETIME = 1200  # seconds; then SIGALRM ends the process
SUBMIT_SECONDS = 120.0
SYS_IO_SETUP, SYS_IO_SUBMIT = 206, 209  # on x86-64
IOCB = struct.Struct("<QIiHhIQQqQII")  # linux/aio_abi.h
IOCB_CMD_PWRITE = 1


class Caller:
    """Runs one; `submitted` returns when all its requests are on their way."""

    def __init__(self, file: Path, way: str, count: int) -> None:
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "prlimit", "--core=1"),
                *(sys.executable, "-m", "tests.fuse.caller", str(file), way, str(count)),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def submitted(self) -> None:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], SUBMIT_SECONDS)[0], "not submitted"
        said = self.process.stdout.readline()
        assert said == b"submitted\n", said

    def exit(self) -> None:
        """Have it return from main."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def execute(self) -> None:
        """Have it run true."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"exec")
        self.exit()

    def close(self) -> None:
        self.process.kill()
        for pipe in self.process.stdin, self.process.stdout:
            assert pipe is not None
            pipe.close()
        self.process.wait(SUBMIT_SECONDS)


def _libaio(fd: int, address: int, count: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    context = ctypes.c_ulong(0)
    if libc.syscall(SYS_IO_SETUP, count, ctypes.byref(context)):
        raise OSError(ctypes.get_errno(), "io_setup")
    control = ctypes.create_string_buffer(IOCB.size * count)
    pointers = (ctypes.c_void_p * count)()
    for index, offset in enumerate(_offsets(fd, count)):
        head = (0, 0, 0, IOCB_CMD_PWRITE, 0, fd)
        IOCB.pack_into(control, index * IOCB.size, *head, address, BLOCK, offset, 0, 0, 0)
        pointers[index] = ctypes.addressof(control) + index * IOCB.size
    done = 0
    while done < count:
        rest = ctypes.byref(pointers, done * ctypes.sizeof(ctypes.c_void_p))
        taken = libc.syscall(SYS_IO_SUBMIT, context, ctypes.c_long(count - done), rest)
        if taken <= 0:
            raise OSError(ctypes.get_errno(), "io_submit")
        done += taken


def _io_uring(fd: int, address: int, count: int, *, workers: bool) -> Ring:
    ring = Ring(count, lambda operation: None, patience=0 if workers else 1 << 30)
    for offset in _offsets(fd, count):
        ring.push(Operation(IORING_OP_WRITE, fd, offset, BLOCK, address=address))
    ring.submit()
    return ring


def _threads(fd: int, memory: mmap.mmap, count: int) -> None:
    for offset in _offsets(fd, count):
        threading.Thread(target=os.pwrite, args=(fd, memory, offset), daemon=True).start()


def _offsets(fd: int, count: int) -> itertools.islice[int]:
    """Of all blocks of the file, one after the other, again and again."""
    blocks = range(0, os.fstat(fd).st_size, BLOCK)
    return itertools.islice(itertools.cycle(blocks), count)


def main(file: str, way: str, count: int) -> None:
    # Its default action ends a process that waits in FUSE, too.
    import signal

    signal.alarm(LIFETIME)
    fd = os.open(file, os.O_RDWR | os.O_DIRECT)
    memory = mmap.mmap(-1, BLOCK)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if way == "libaio":
        _libaio(fd, address, count)
    elif way == "threads":
        _threads(fd, memory, count)
    else:
        ring = _io_uring(fd, address, count, workers=way == "io_uring workers")  # noqa: F841
    os.write(1, b"submitted\n")
    if sys.stdin.read() == "exec":
        threading.Thread(target=os.execlp, args=("true", "true")).start()
        threading.Event().wait()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
