"""How soon a disk is back: from the moment a server listens to the first parked write's answer."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from tests.bench import disks

BLOCK = 4096
OUTAGES = (0.5, 2.0, 10.0)  # seconds
DISK = 64 << 20  # bytes
DEADLINE = 60.0  # seconds

Mount = Callable[[Path, Path], AbstractContextManager[Path]]


@contextlib.contextmanager
def healfs(directory: Path, server: Path) -> Iterator[Path]:
    with disks.healfs_mount(f"nbd+unix:///?socket={server}", "", None) as mount:
        yield mount.file


@contextlib.contextmanager
def retry_filter(directory: Path, server: Path) -> Iterator[Path]:
    """nbdkit's retry filter over its own NBD client, as impatient as it can be, and nbdfuse."""
    patient = ("retries=1000", "retry-delay=1", "retry-exponential=no")
    upstream = ("--filter=retry", "nbd", f"socket={server}", *patient)
    # Quiet: it tells of each try.
    retrying = disks.nbdkit(directory, *upstream, quiet=True)
    with retrying as (_, uri), disks.nbdfuse(directory, uri) as file:
        yield file


PEERS: dict[str, Mount] = {"healfs": healfs, "nbdkit's retry filter": retry_filter}


class Server:
    """nbdkit at one socket, killed and started again; its data outlives it in a file."""

    def __init__(self, directory: Path, size: int = DISK) -> None:
        self.path = directory / "server.sock"
        self.file = directory / "server.img"
        self.file.touch()
        os.truncate(self.file, size)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """When it listened (time.monotonic)."""
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(("nbdkit", "-f", "-U", self.path, "file", self.file))
        until = time.monotonic() + DEADLINE
        while not self._listens():
            if time.monotonic() > until:
                raise TimeoutError("nbdkit does not listen")
            time.sleep(0.0005)
        return time.monotonic()

    def _listens(self) -> bool:
        """Without a connection, which would be the server's only one."""
        listening = Path("/proc/net/unix").read_text().splitlines()
        # Num RefCount Protocol Flags Type St Inode Path; 00010000: __SO_ACCEPTCON
        return any(line.endswith(f" {self.path}") and " 00010000 " in line for line in listening)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def measure(peer: Mount, directory: Path, outage: float, times: int) -> list[float]:
    """Seconds, one figure an outage."""
    server = Server(directory)
    try:
        server.start()
        with peer(directory, server.path) as file:
            return [_one(server, file, outage) for _ in range(times)]
    finally:
        server.kill()


def _one(server: Server, file: Path, outage: float) -> float:
    answered: list[float] = []

    def write() -> None:
        fd = os.open(file, os.O_RDWR | os.O_DIRECT)
        try:
            os.pwrite(fd, mmap.mmap(-1, BLOCK), 0)
            answered.append(time.monotonic())
        finally:
            os.close(fd)

    write()
    answered.clear()
    server.kill()
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    time.sleep(outage)
    if answered:
        raise RuntimeError("the write was answered without a server")
    listened = server.start()
    writer.join(DEADLINE)
    if not answered:
        return float("inf")
    return max(0.0, answered[0] - listened)
