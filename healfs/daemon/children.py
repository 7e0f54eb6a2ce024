"""The keeper's children: workers, and what is to become one. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PROTOCOL = 2  # of the messages between keeper and worker, which may be of different versions
HANDED_OVER = 3  # the exit status of a worker that has made room for a new version
FAULTED = 4  # of one that has ended itself upon an internal error
PACKET = 1 << 16
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Program:
    """One version of healfs: its interpreter, and the PYTHONPATH it is found with, if any."""

    interpreter: str
    path: str | None


def readable(fd: int) -> bool:
    """Now. Of a pidfd: the process has ended, with all its threads."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class Child:
    """A process, and the socket to it. Nothing here waits, but reap() for one that has ended.

    Raises OSError when it cannot be started.
    """

    def __init__(
        self, program: Program, fds: Mapping[str, int], greeting: Mapping[str, Any]
    ) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if program.path is not None:
            environment["PYTHONPATH"] = program.path
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self._open = True
        with theirs:
            passed = {**fds, "keeper": theirs.fileno()}
            # Ctrl-C goes to it, too, and must not find it before it ignores that.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            try:
                self._process = subprocess.Popen(
                    [program.interpreter, "-P", "-m", "healfs.daemon.worker", json.dumps(passed)],
                    pass_fds=tuple(fd for fd in passed.values() if fd >= 0),
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self.tell(greeting)

    def tell(self, message: Mapping[str, Any], fds: tuple[int, ...] = ()) -> None:
        with contextlib.suppress(OSError):  # it has died: its pidfd tells
            socket.send_fds(self.socket, [json.dumps(message).encode()], fds)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last time: objects with a `do`. It may be of any version."""
        while self._open:
            try:
                packet = self.socket.recv(PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            self._open = bool(packet)
            with contextlib.suppress(ValueError):
                message = json.loads(packet)
                if isinstance(message, dict) and "do" in message:
                    yield message

    def descriptors(self) -> list[int]:
        """Readable when it has said something, or ended."""
        return [self._pidfd, self.socket.fileno()] if self._open else [self._pidfd]

    def has_ended(self) -> bool:
        return readable(self._pidfd)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()

    def give_up(self) -> None:
        """Kill it, and listen no more."""
        self.kill()
        self._open = False

    def reap(self) -> int:
        """Its status: negative for a signal."""
        os.close(self._pidfd)
        self.socket.close()
        return self._process.wait()


def how(status: int) -> str:
    if status == FAULTED:
        return "by an internal error"
    return f"with signal {-status}" if status < 0 else f"with status {status}"
