"""The death of the worker is one more outage: its successor answers what was in flight."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from healfs.control.client import ControlError
from tests.backends.nbd_servers import NbdServer, wait_until
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import Opener
from tests.fuse.test_verify import _fio
from tests.mounts import HealfsMount

MEGABYTES = 64
KILLS = 5


def _kill_worker(mount: HealfsMount) -> None:
    """kill -9, and until another one answers."""
    old = mount.status()["pids"]["worker"]
    os.kill(old, signal.SIGKILL)

    def succeeded() -> bool:
        try:
            return bool(mount.status()["pids"]["worker"] != old)
        except (ControlError, subprocess.CalledProcessError):
            return False  # it died before it had answered

    wait_until(succeeded, "another worker", 60)


def _done(mount: HealfsMount) -> int:
    totals = mount.status()["totals"]
    return int(totals["write"]["requests"] + totals["read"]["requests"])


def _verify_through_kills(mount: HealfsMount, kills: int) -> None:
    load = _fio(mount.file, MEGABYTES)
    for _ in range(kills):
        _kill_worker(mount)
        before = _done(mount)
        wait_until(
            lambda before=before: _done(mount) > before or load.poll() is not None, "I/O", 60
        )
    said, _ = load.communicate(timeout=300)
    assert load.returncode == 0, said


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.img"
    with open(path, "xb") as file:
        file.truncate(MEGABYTES << 20)
    return path


def test_fio_verifies_through_kills_on_a_file(large: Path, healfs_mount: Mounter) -> None:
    _verify_through_kills(healfs_mount(large), KILLS)


@pytest.mark.soak
def test_fio_verifies_through_twenty_kills_on_a_file(large: Path, healfs_mount: Mounter) -> None:
    _verify_through_kills(healfs_mount(large), 20)


def test_what_waits_in_an_outage_is_answered_by_the_successor(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    writers = [agent(mount.file) for _ in range(4)]
    server.kill()
    for number, writer in enumerate(writers):
        writer.ask("pwrite", number * 4096, bytes([number + 1]) * 4096)
    mount.wait_until(lambda status: status["requests"]["parked"] == 4, 30)
    _kill_worker(mount)
    mount.wait_until(lambda status: status["requests"]["parked"] == 4, 30)
    server.start()
    assert [writer.answer().errno for writer in writers] == [0] * 4
    read = agent(mount.file).ok("pread", 0, 4 * 4096)
    assert read == b"".join(bytes([number + 1]) * 4096 for number in range(4))


def test_worker_and_server_killed_together(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    writer = agent(mount.file)
    writer.ok("pwrite", 0, b"A" * 4096)
    server.kill()
    _kill_worker(mount)
    server.start()
    writer.ok("pwrite", 8192, b"B" * 4096)
    assert writer.ok("pread", 0, 4096) == b"A" * 4096
    writer.ok("fsync")


def test_the_successor_has_the_policy_the_mode_and_the_pause(
    image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(image)
    mount.policy("--werror", "report", "--read-retry-timeout", "7s")
    os.chmod(mount.file, 0o640)
    before = mount.status()["policy"]
    _kill_worker(mount)
    assert mount.status()["policy"] == before
    assert os.stat(mount.file).st_mode & 0o777 == 0o640
    writer: Agent = agent(mount.file)
    assert writer.do("pwrite", 1 << 40, b"x" * 512).errno == errno.ENOSPC


def test_a_worker_that_dies_in_a_mount_that_is_unmounted(commands: Commands, image: Path) -> None:
    """The keeper does not start another one for a mount that goes away."""
    assert commands.mount(image).returncode == 0
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left()
