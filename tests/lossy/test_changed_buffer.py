"""A caller that changes its buffer while its write is in flight, and the worker dies.

The kernel reads the pages again when the request comes again. Whichever of the two contents it
is then, each request reads as one of them, whole, and stays so: after a late landing of the first
attempt, a flush, the loss of the server's cache, and the death of another worker.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.conftest import Opener
from tests.fuse.control import control
from tests.killpoints import KillPoints
from tests.killpoints import kill_points as kill_points
from tests.lossy.rig import LossyServer
from tests.mounts import HealfsMount

REQUEST = 1 << 20  # bytes: the largest WRITE


class Buffer:
    """A caller's buffer, which the test has mapped, too."""

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        path.write_bytes(bytes(length))
        with open(path, "r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), length)
        self.fill(b"A")

    def fill(self, letter: bytes) -> None:
        self._bytes[:] = letter * len(self._bytes)


def _contents(agent: Agent, length: int) -> str:
    """One letter for each request."""
    found = ""
    for offset in range(0, length, REQUEST):
        data = agent.ok("pread", offset, min(REQUEST, length - offset))
        assert data[:1] in b"AB", f"neither content at {offset}: {data[:16]!r}"
        assert data == data[:1] * len(data), f"torn at {offset}"
        found += data[:1].decode()
    return found


def _stays(mount: HealfsMount, server: LossyServer, agent: Agent, length: int) -> str:
    found = _contents(agent, length)
    server.set(land=True)
    assert _contents(agent, length) == found
    mount.kill_worker()
    assert _contents(agent, length) == found
    server.kill()  # what was not flushed is gone
    server.start()
    assert _contents(agent, length) == found
    agent.ok("fsync")
    server.kill()
    stable = server.stable.read_bytes()[:length]
    assert stable[::REQUEST].decode() == found
    server.start()
    assert _contents(agent, length) == found
    return found


@pytest.fixture
def mount(server: LossyServer, healfs_mount: Mounter, kill_points: KillPoints) -> HealfsMount:
    return healfs_mount(server.uri())


def test_the_server_has_the_first_bytes(
    mount: HealfsMount, server: LossyServer, agent: Opener, tmp_path: Path
) -> None:
    """It took them, and carries them out late: what is sent meanwhile must be the same."""
    buffer = Buffer(tmp_path / "buffer", 65536)
    writer = agent(mount.file)
    server.set(hold=1)
    writer.ask("pwrite_from", str(buffer.path), 0)
    server.until("held", 1)
    buffer.fill(b"B")
    mount.kill_worker()
    assert writer.answer().value == 65536
    assert server.handover.exists(), "nothing is left to land"
    assert _stays(mount, server, agent(mount.file), 65536) == "A"
    assert server.landed_late()


# The record of the first bytes is not whole at the first: only there the second ones are taken.
POINTS = {
    "half-entry": "B",
    "log-entry": "A",
    "backend-completed": "A",
    "completed-entry": "A",
    "reply": "A",
}


@pytest.mark.parametrize("point", POINTS)
def test_the_worker_dies_at(
    mount: HealfsMount,
    server: LossyServer,
    agent: Opener,
    tmp_path: Path,
    kill_points: KillPoints,
    point: str,
) -> None:
    buffer = Buffer(tmp_path / "buffer", 65536)
    writer = agent(mount.file)
    with kill_points.gate():
        kill_points.arm((point, 1))
        writer.ask("pwrite_from", str(buffer.path), 0)
        assert kill_points.reached(point)["held"] == 1
        buffer.fill(b"B")
    assert writer.answer().value == 65536
    assert _stays(mount, server, agent(mount.file), 65536) == POINTS[point]


def test_a_write_of_several_requests(
    mount: HealfsMount,
    server: LossyServer,
    agent: Opener,
    tmp_path: Path,
    kill_points: KillPoints,
) -> None:
    """The kernel sends them one after the other."""
    length = 4 * REQUEST
    buffer = Buffer(tmp_path / "buffer", length)
    writer = agent(mount.file)
    with kill_points.gate():
        kill_points.arm(("reply", 2))
        writer.ask("pwrite_from", str(buffer.path), 0)
        kill_points.reached("reply")
        buffer.fill(b"B")
    assert writer.answer().value == length
    assert _stays(mount, server, agent(mount.file), length) == "AABB"


def test_the_backend_is_away(
    mount: HealfsMount, server: LossyServer, agent: Opener, tmp_path: Path
) -> None:
    """Nothing was sent of what waits: the second bytes are as good."""
    buffer = Buffer(tmp_path / "buffer", 65536)
    writer = agent(mount.file)
    server.kill()
    with control(mount) as disk:
        writer.ask("pwrite_from", str(buffer.path), 0)
        disk.parked(1)
    buffer.fill(b"B")
    mount.kill_worker()
    server.start()
    assert writer.answer().value == 65536
    assert _stays(mount, server, agent(mount.file), 65536) == "B"
