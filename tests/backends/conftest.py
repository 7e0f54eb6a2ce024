"""What the backend tests share: a client that drives a backend as the worker does, a loop
device, and a FUSE store that answers nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from healfs.backends.base import Backend, Geometry
from healfs.core.request import Kind, Request
from tests.backends.ext4 import Ext4

DEADLINE = 120.0  # seconds for anything that ought to take much less
FUSE_CONNECTIONS = Path("/sys/fs/fuse/connections")


def make_request(
    kind: Kind,
    offset: int = 0,
    length: int = 0,
    *,
    data: bytes | bytearray | memoryview | None = None,
    fua: bool = False,
    may_unmap: bool = False,
) -> Request:
    if data is not None:
        length = len(data)
    return Request(kind, offset, length, lambda *_: None, data=data, fua=fua, may_unmap=may_unmap)


class Client:
    """Drives a connected backend; every answer is recorded, in order."""

    def __init__(self, backend: Backend, geometry: Geometry) -> None:
        self.backend = backend
        self.geometry = geometry
        self.answers: list[tuple[Request, int, bytes | None]] = []
        self.lost: OSError | None = None
        self._more = trio.Event()

    def send(self, *requests: Request) -> None:
        for request in requests:
            self.backend.submit(request, self._done)
        self.backend.commit()

    def _done(self, request: Request, error: int, data: memoryview | bytes | None) -> None:
        self.answers.append((request, error, None if data is None else bytes(data)))
        self._more.set()

    async def until(self, condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
        """Wait for answers (or the loss) until the condition holds; else fail."""
        with trio.fail_after(seconds):
            while not condition():
                self._more = trio.Event()
                await self._more.wait()

    async def do(self, request: Request) -> tuple[int, bytes | None]:
        before = len(self.answers)
        self.send(request)
        await self.until(lambda: any(a[0] is request for a in self.answers[before:]))
        return next((e, d) for r, e, d in self.answers[before:] if r is request)

    async def read(self, offset: int, length: int) -> bytes:
        error, data = await self.do(make_request(Kind.READ, offset, length))
        assert error == 0 and data is not None, os.strerror(error)
        assert len(data) == length
        return data

    async def write(self, offset: int, data: bytes | bytearray, *, fua: bool = False) -> None:
        error, _ = await self.do(make_request(Kind.WRITE, offset, data=data, fua=fua))
        assert error == 0, os.strerror(error)

    async def serve(self) -> None:
        self.lost = await self.backend.serve()
        self._more.set()


@asynccontextmanager
async def connected(backend: Backend) -> AsyncIterator[Client]:
    """A connected client whose serve() runs; closed, not aclosed, at the end."""
    client = Client(backend, await backend.connect())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.serve)
        try:
            yield client
        finally:
            backend.close()
            nursery.cancel_scope.cancel()


async def eventually(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """For what no event tells of (another process, the kernel)."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "xb") as file:
        file.truncate(1 << 20)
    return path


@pytest.fixture
def loop_device(image: Path) -> Iterator[str]:
    done = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True, timeout=120)


@pytest.fixture
def write_through(loop_device: str) -> Iterator[str]:
    """A loop device of which the kernel believes that it has no volatile cache."""
    cache = Path("/sys/block") / Path(loop_device).name / "queue/write_cache"
    before = cache.read_text()
    assert before == "write back\n"
    cache.write_text("write through")
    yield loop_device
    cache.write_text(before)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Ext4]:
    made = Ext4(tmp_path)
    yield made
    made.close()


@dataclass
class HeldStore:
    """A file on a FUSE file system that holds every data request until it is told not to."""

    path: Path
    connection: Path
    process: subprocess.Popen[bytes]
    log: Path

    def release(self) -> None:
        """From now on requests are answered, the held ones first."""
        self.process.send_signal(signal.SIGUSR1)

    def held(self) -> int:
        """Requests that came so far."""
        return self.log.stat().st_size

    def abort(self) -> None:
        (self.connection / "abort").write_text("1")


@pytest.fixture
def held_store(tmp_path: Path) -> Iterator[HeldStore]:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse")
    if not os.path.ismount(FUSE_CONNECTIONS):
        subprocess.run(
            ["mount", "-t", "fusectl", "fusectl", str(FUSE_CONNECTIONS)], check=False, timeout=120
        )
    mountpoint = tmp_path / "held"
    mountpoint.mkdir()
    log = tmp_path / "held.log"
    log.touch()
    script = Path(__file__).with_name("held_store.py")
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", sys.executable, script, mountpoint, log]
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while not os.path.ismount(mountpoint):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        minor = os.minor(os.lstat(mountpoint).st_dev)
        connection = FUSE_CONNECTIONS / str(minor)
        store = HeldStore(mountpoint / "disk.img", connection, process, log)
        yield store
        if (connection / "abort").exists():
            store.abort()
    finally:
        subprocess.run(["umount", "--lazy", str(mountpoint)], check=False, timeout=120)
        process.terminate()
        process.wait(timeout=120)
