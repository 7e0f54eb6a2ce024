"""How soon a disk is back: from the moment a server listens to the first parked write's answer."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from tests.bench import disks

BLOCK = 4096
DISK = 64 << 20  # bytes
DEADLINE = 60.0  # seconds
# Outages of one length are longer by up to so much, evenly: whoever asks once a second is met at
# all moments of that second, and not 20 times at the same.
PHASE = 1.0
TCP_LISTEN = "0A"
SO_ACCEPTCON = "00010000"

Mount = Callable[[Path, str], AbstractContextManager[Path]]  # of a directory and an NBD URI


@contextlib.contextmanager
def healfs(directory: Path, uri: str) -> Iterator[Path]:
    with disks.healfs_mount(uri, "", None) as mount:
        yield mount.file


@contextlib.contextmanager
def retry_filter(directory: Path, uri: str) -> Iterator[Path]:
    """nbdkit's retry filter over its own NBD client, as impatient as it can be, and nbdfuse."""
    patient = ("retries=1000", "retry-delay=1", "retry-exponential=no")
    upstream = ("--filter=retry", "nbd", f"uri={uri}", *patient)
    # Quiet: it tells of each try.
    retrying = disks.nbdkit(directory, *upstream, quiet=True)
    with retrying as (_, mine), disks.nbdfuse(directory, mine) as file:
        yield file


PEERS: dict[str, Mount] = {"healfs": healfs, "nbdkit's retry filter": retry_filter}


class Server:
    """nbdkit at one address, killed and started again; its data outlives it in a file."""

    def __init__(self, directory: Path, size: int = DISK, *, tcp: bool = False) -> None:
        self._path = directory / "server.sock"
        self._port = _free_port() if tcp else None
        self._file = disks.backing_file(directory, size)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        if self._port is None:
            return f"nbd+unix:///?socket={self._path}"
        return f"nbd://127.0.0.1:{self._port}"

    def start(self) -> float:
        """When it listened (time.monotonic)."""
        self._path.unlink(missing_ok=True)
        address: tuple[str | Path, ...] = ("-U", self._path)
        if self._port is not None:
            address = ("-i", "127.0.0.1", "-p", str(self._port))
        self._process = subprocess.Popen(("nbdkit", "-f", *address, "file", self._file))
        until = time.monotonic() + DEADLINE
        while not self._listens():
            if time.monotonic() > until:
                raise TimeoutError("nbdkit does not listen")
            time.sleep(0.0005)
        return time.monotonic()

    def _listens(self) -> bool:
        """Without a connection, which would be the server's only one."""
        if self._port is None:
            sockets = Path("/proc/net/unix").read_text().splitlines()
            # Num RefCount Protocol Flags Type St Inode Path
            return any(
                line.endswith(f" {self._path}") and f" {SO_ACCEPTCON} " in line for line in sockets
            )
        # sl local_address rem_address st ...
        sockets = Path("/proc/net/tcp").read_text().splitlines()
        mine = f":{self._port:04X}"
        return any(
            fields[1].endswith(mine) and fields[3] == TCP_LISTEN
            for fields in map(str.split, sockets)
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _free_port() -> int:
    """Below those that the kernel gives to clients: one that connects to itself, while nobody
    listens, would have the port when the server wants it."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def measure(
    peer: Mount, directory: Path, outage: float, times: int, *, tcp: bool = False
) -> list[float]:
    """Seconds, one figure an outage."""
    server = Server(directory, tcp=tcp)
    try:
        server.start()
        with peer(directory, server.uri) as file:
            lengths = [outage + PHASE * number / times for number in range(times)]
            random.shuffle(lengths)
            return [_one(server, file, length) for length in lengths]
    finally:
        server.kill()


def _one(server: Server, file: Path, outage: float) -> float:
    answered: list[float] = []
    failed: list[OSError] = []

    def write() -> None:
        fd = os.open(file, os.O_RDWR | os.O_DIRECT)
        try:
            os.pwrite(fd, mmap.mmap(-1, BLOCK), 0)
            answered.append(time.monotonic())
        except OSError as error:
            failed.append(error)
        finally:
            os.close(fd)

    write()
    answered.clear()
    server.kill()
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(outage)
    if answered or failed:
        raise RuntimeError(f"the write did not wait for a server: {failed or 'answered'}")
    listened = server.start()
    writer.join(DEADLINE)
    if not answered:
        raise RuntimeError(f"no answer after {outage:.1f} s of outage: {failed or 'it hangs'}")
    return max(0.0, answered[0] - listened)
