"""What the tests of real mounts share: a disk's image, a server, processes that touch the file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.backends.conftest import HeldStore as HeldStore
from tests.backends.conftest import ext4 as ext4
from tests.backends.conftest import held_store as held_store
from tests.backends.conftest import loop_device as loop_device
from tests.backends.conftest import write_through as write_through
from tests.backends.nbd_servers import NbdServer, nbdkit
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.mounts import HEALFS

SIZE = 16 << 20
NOBODY = 65534


@pytest.fixture(scope="session", autouse=True)
def _needs_fuse() -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "xb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def server(image: Path) -> Iterator[NbdServer]:
    """nbdkit on the image, greeting."""
    with nbdkit("file", str(image)) as running:
        yield running


@pytest.fixture
def other_users() -> None:
    """Of the machine: a checkout in root's home, say, is not theirs to run."""
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", HEALFS, "--version"]
    if subprocess.run(command, capture_output=True, timeout=120).returncode:
        pytest.skip("other users cannot run healfs from here")


class Opener(Protocol):
    def __call__(self, file: Path, flags: int = ...) -> Agent: ...


@pytest.fixture
def agent(healfs_mount: Mounter) -> Iterator[Opener]:
    """Opens files in other processes; all of them are killed with the test, before the mounts.

    That they do end is promise 9 of DESIGN.md.
    """
    agents: list[Agent] = []

    def opened(file: Path, flags: int = os.O_RDWR) -> Agent:
        agents.append(Agent(file, flags))
        assert not agents[-1].opened.errno, agents[-1].opened
        return agents[-1]

    yield opened
    for one in agents:
        one.kill()
    for one in agents:
        one.ended()


@pytest.fixture
def commands() -> Iterator[Commands]:
    """`healfs` with a runtime directory and a mountpoint of its own, nothing mounted yet."""
    with Commands() as made:
        yield made


Rules = Callable[[str], None]


@pytest.fixture
def fault(tmp_path: Path) -> Rules:
    """Writes the rules of --fault (its file is `faults.toml` in tmp_path), whole or not at all."""

    def write(text: str) -> None:
        new = tmp_path / "faults.new"
        new.write_text(text)
        new.replace(tmp_path / "faults.toml")

    write("")
    return write
