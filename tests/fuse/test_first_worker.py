"""The worker dies while the mount is being made: there is a mount and `healfs mount` says so, or
there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.test_systemd import GENEROUS, Manager
from tests.fuse.test_upgrade import Version

BLOCK = b"x" * 4096
# The line before which it is killed, once.
POINTS = {
    "before the INIT reply": ("fuse/channel.py", '                self._init = b""\n'),
    "before it says that it serves": (
        "daemon/worker.py",
        "        with contextlib.suppress(ParentError):\n",
    ),
    "before it is reported": ("daemon/worker.py", "        self.report.ready(file, notes, off)\n"),
    "before the keeper hears that": (
        "daemon/worker.py",
        '        self.parent.tell({"do": "ready"})\n',
    ),
}


def _plant(version: Version, file: str, line: str) -> None:
    once = version.directory / "killed"
    indent = re.match(" *", line)
    assert indent is not None
    kill = (
        f"if not __import__('os').path.exists({str(once)!r}):"
        f" open({str(once)!r}, 'x').close(); __import__('os').kill(__import__('os').getpid(), 9)\n"
    )
    version.change(file, line, indent[0] + kill + line)


@pytest.fixture
def manager(commands: Commands) -> Iterator[Manager]:
    manager = Manager(f"@healfs-{commands.directory.name}", commands)
    yield manager
    manager.close()


@pytest.fixture
def planted(commands: Commands, tmp_path: Path) -> Iterator[Version]:
    version = Version(tmp_path / "version")
    commands.environment["PYTHONPATH"] = str(version.directory)
    yield version
    assert (version.directory / "killed").exists()


@pytest.mark.parametrize("point", POINTS)
def test_a_mount_that_is_made_by_two_workers(
    commands: Commands, image: Path, planted: Version, point: str
) -> None:
    _plant(planted, *POINTS[point])
    done = commands.mount(image)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{commands.file}\n", "")
    agent = Agent(commands.file)
    try:
        assert agent.ok("pwrite", 0, BLOCK) == len(BLOCK)
        assert agent.ok("pread", 0, len(BLOCK)) == BLOCK
        assert commands.status()["worker_restarts"] == 1
    finally:
        agent.kill()
        agent.ended()
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left()


@pytest.mark.parametrize("point", POINTS)
def test_a_service_that_is_started_by_two_workers(
    manager: Manager, image: Path, planted: Version, point: str
) -> None:
    _plant(planted, *POINTS[point])
    running = manager.start(image)
    manager.ready()
    assert running.stdout is not None
    assert running.stdout.readline() == f"{manager.commands.file}\n"
    agent = Agent(manager.commands.file)
    try:
        assert agent.ok("pwrite", 0, BLOCK) == len(BLOCK)
    finally:
        agent.kill()
        agent.ended()
    running.terminate()
    assert running.wait(GENEROUS) == 0
    manager.commands.nothing_left()


def test_no_mount_without_the_kernels_first_request(
    commands: Commands, image: Path, planted: Version
) -> None:
    """The worker is killed before the keeper has it: no other one could go on."""
    _plant(planted, "fuse/channel.py", "                self.on_init(self._init, bytes(reply))\n")
    done = commands.mount(image)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the daemon died" in done.stderr
    commands.nothing_left()
