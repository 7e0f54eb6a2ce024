"""The unit healfs@.service under a real systemd, the first process of namespaces of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, nbdkit, wait_until
from tests.mounts import HEALFS, ROOT

LIMIT = 800  # seconds that it lives at the most
GENEROUS = 120.0
AT_ONCE = 30.0  # 5 s, and what systemctl and a busy machine take
UNIT = "healfs@vm1.service"
WRITE = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR)
assert os.pwrite(file, bytes([int(sys.argv[2])]) * 4096, 0) == 4096
os.fsync(file)
"""


class Systemd:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.file = self.mountpoint / "disk.img"
        for name in "units", "etc", "work", "mnt", "prefix":
            (directory / name).mkdir()
        for target in "test", "sysinit", "basic", "shutdown":
            (directory / f"units/{target}.target").write_text("[Unit]\nDescription=Nothing\n")
        unit = (ROOT / "healfs/data/healfs@.service").read_text()
        (directory / "prefix/bin").symlink_to(HEALFS.parent)
        unit = unit.replace("@PREFIX@", str(directory / "prefix"))
        (directory / "units/healfs@.service").write_text(unit)
        (directory / "etc/healfs").mkdir()
        self.said = directory / "said"
        with open(self.said, "w") as said:
            self.process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "timeout", "-s", "KILL", str(LIMIT)),
                    *(ROOT / "tests/fuse/real_systemd.sh", directory),
                ],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def come_up(self) -> None:
        """pytest.skip where this machine does not let it."""

        def runs() -> bool:
            if self.process.poll() is not None:
                pytest.skip(f"no systemd in a namespace: {self.said.read_text()[-300:]}")
            with suppress(subprocess.CalledProcessError, OSError):
                return self.run("systemctl", "is-system-running") == "running\n"
            return False

        wait_until(runs, "systemd", GENEROUS)

    def _first(self) -> str:
        """The pid of systemd, seen from here."""
        child, found = self.process.pid, ""
        while children := Path(f"/proc/{child}/task/{child}/children").read_text().split():
            child = int(children[0])
            found = children[0]
            if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                return found
        raise ProcessLookupError("it has not begun")

    def run(self, *command: str | Path, seconds: float = GENEROUS) -> str:
        """A command inside."""
        return subprocess.run(
            ["nsenter", "-t", self._first(), "-p", "-m", "-u", "-i", "-C", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds,
        ).stdout

    def show(self, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, UNIT).strip()

    def until(self, name: str, word: str) -> None:
        wait_until(lambda: word in self.show(name), f"{name} {word}", GENEROUS)

    def write(self, byte: int) -> None:
        """A block, to stable storage."""
        self.run(sys.executable, "-c", WRITE, self.file, str(byte))

    def is_mounted(self) -> bool:
        return f" {self.mountpoint} " in self.run("cat", "/proc/self/mountinfo")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # systemd goes with them, and all inside
        self.process.wait(GENEROUS)
        with suppress(FileNotFoundError):
            group = Path((self.directory / "cgroup").read_text().strip())
            events = group / "cgroup.events"
            wait_until(lambda: "populated 0" in events.read_text(), "the end of all", GENEROUS)
            for directory, _, _ in os.walk(group, topdown=False):
                os.rmdir(directory)


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    if not Path("/lib/systemd/systemd").exists():
        pytest.skip("needs systemd")
    directory = Path(tempfile.mkdtemp(prefix="healfs-systemd-"))
    made = Systemd(directory)
    try:
        made.come_up()
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def test_the_unit_lives_through_deaths_and_stops_in_an_outage(
    systemd: Systemd, image: Path
) -> None:
    server: NbdServer = nbdkit("file", str(image))
    try:
        config = f'source = "{server.uri()}"\nmountpoint = "{systemd.mountpoint}"\n'
        (systemd.directory / "etc/healfs/vm1.toml").write_text(config)
        # Ready when the disk can be used, not before.
        systemd.run("systemctl", "start", "--no-block", UNIT)
        systemd.until("StatusText", "waiting for")
        assert systemd.show("ActiveState") == "activating"
        server.start()
        systemd.until("ActiveState", "active")
        systemd.until("StatusText", "ready")
        systemd.write(1)
        assert image.read_bytes()[:4096] == b"\1" * 4096
        # The worker's death is no matter of systemd's.
        keeper = systemd.show("MainPID")
        (worker,) = systemd.run("pgrep", "-P", keeper).split()
        systemd.run("kill", "-9", worker)
        systemd.write(2)
        assert systemd.run("pgrep", "-P", keeper).split() != [worker]
        assert (systemd.show("MainPID"), systemd.show("NRestarts")) == (keeper, "0")
        # The keeper's is: the worker that is left ends, and there is another mount.
        systemd.run("kill", "-9", keeper)
        systemd.until("NRestarts", "1")
        systemd.until("ActiveState", "active")
        assert image.read_bytes()[:4096] == b"\2" * 4096
        systemd.until("StatusText", "ready")
        systemd.write(3)
        # An outage shows, and does not hold up the end.
        server.kill()
        systemd.until("StatusText", "stalled since")
        before = time.monotonic()
        systemd.run("systemctl", "stop", UNIT)
        assert time.monotonic() - before < AT_ONCE
        assert (systemd.show("ActiveState"), systemd.show("Result")) == ("inactive", "success")
        assert not systemd.is_mounted()
        assert "healfs" not in systemd.run("ps", "-e", "-o", "args=")
    finally:
        server.close()
