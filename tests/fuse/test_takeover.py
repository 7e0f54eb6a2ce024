"""The death of the worker is one more outage: its successor answers what was in flight."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, wait_until
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import Opener


def test_what_waits_in_an_outage_is_answered_by_the_successor(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    writers = [agent(mount.file) for _ in range(4)]
    server.kill()
    for number, writer in enumerate(writers):
        writer.ask("pwrite", number * 4096, bytes([number + 1]) * 4096)
    mount.wait_until(lambda status: status["requests"]["parked"] == 4)
    mount.kill_worker()
    mount.wait_until(lambda status: status["requests"]["parked"] == 4)
    server.start()
    assert [writer.answer().errno for writer in writers] == [0] * 4
    read = agent(mount.file).ok("pread", 0, 4 * 4096)
    assert read == b"".join(bytes([number + 1]) * 4096 for number in range(4))


def test_of_writes_to_one_place_the_newest_stays(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    """The kernel sends what waits again in an order of its own."""
    mount = healfs_mount(server.uri())
    writers = [agent(mount.file) for _ in range(8)]
    server.kill()
    for number, writer in enumerate(writers, 1):
        writer.ask("pwrite", 0, bytes([number]) * (9 - number) * 4096)
        mount.wait_until(lambda status, n=number: status["requests"]["parked"] == n)  # type: ignore[misc]
    mount.kill_worker()
    mount.wait_until(lambda status: status["requests"]["parked"] == 8)
    server.start()
    assert [writer.answer().errno for writer in writers] == [0] * 8
    read = agent(mount.file).ok("pread", 0, 8 * 4096)
    assert read == b"".join(bytes([number]) * 4096 for number in range(8, 0, -1))


def test_the_successor_has_the_policy_the_owner_the_mode_and_the_pause(
    image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(image)
    writer: Agent = agent(mount.file)
    mount.policy("--werror", "report", "--read-retry-timeout", "7s")
    os.chown(mount.file, 64055, 108)
    os.chmod(mount.file, 0o640)
    mount.run("pause", str(mount.mountpoint))
    before = mount.status()
    mount.kill_worker()
    after = mount.status()
    assert after["policy"] == before["policy"]
    assert after["policy"]["read"]["retry_timeout"] == 7
    assert after["state"] == "paused" and after["since"] == before["since"]
    assert after["pause"] == before["pause"] and after["pause"]["by"] == "operator"
    # The kernel keeps attributes for an hour: this asks the successor.
    stat = ["stat", "--cached=never", "--format=%u %g %a", str(mount.file)]
    found = subprocess.run(stat, capture_output=True, text=True, check=True, timeout=120).stdout
    assert found == "64055 108 640\n"
    writer.ask("pwrite", 0, b"x" * 512)
    mount.wait_until(lambda status: status["requests"]["parked"] == 1)
    assert not writer.answered
    mount.run("resume", str(mount.mountpoint))
    assert writer.answer().value == 512
    assert writer.do("pwrite", 1 << 40, b"x" * 512).errno == errno.ENOSPC


def test_a_worker_that_dies_in_a_mount_that_is_unmounted(commands: Commands, image: Path) -> None:
    """The keeper does not start another one for a mount that goes away."""
    assert commands.mount(image).returncode == 0
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left()


@pytest.mark.parametrize("kind", ["file", "nbd"])
def test_nobody_gets_the_source_between_two_workers(
    commands: Commands, server: NbdServer, image: Path, kind: str
) -> None:
    source = server.uri() if kind == "nbd" else image
    assert commands.mount(source).returncode == 0
    pids = commands.status()["pids"]
    os.kill(pids["keeper"], signal.SIGSTOP)
    try:
        os.kill(pids["worker"], signal.SIGKILL)
        with Commands() as second:
            done = second.mount(source)
            assert done.returncode == 1 and "in use by another healfs" in done.stderr
            second.nothing_left()
    finally:
        os.kill(pids["keeper"], signal.SIGCONT)
    wait_until(lambda: not commands.run("umount", commands.mountpoint).returncode, "the umount")
    with Commands() as second:
        assert second.mount(source).returncode == 0
        pids = second.status()["pids"]
        os.kill(pids["keeper"], signal.SIGKILL)  # then the worker has it alone
        wait_until(lambda: second.status()["pids"]["keeper"] == 0, "the keeper's end")
        assert commands.mount(source).returncode == 1
        assert second.run("umount", second.mountpoint).returncode == 0
        second.nothing_left(30)
    assert commands.mount(source).returncode == 0
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left()
