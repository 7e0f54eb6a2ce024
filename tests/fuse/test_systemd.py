"""What systemd is told, on a real mount; and a worker that hangs is replaced."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, nbdkit
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.mounts import ROOT

GENEROUS = 240.0
BLOCK = b"x" * 4096
Message = dict[str, str]


class Manager:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str, commands: Commands) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.commands = commands
        commands.environment |= {"NOTIFY_SOCKET": address}
        self.had: list[tuple[float, Message]] = []  # and when
        self._seen = 0
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while text := self.socket.recv(4096).decode():
            message = dict(line.split("=", 1) for line in text.splitlines())
            with self._arrived:
                self.had.append((time.monotonic(), message))
                self._arrived.notify()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RD)
        self._reader.join()
        self.socket.close()

    def start(self, source: str | Path, *options: str) -> subprocess.Popen[str]:
        mounting = ("mount", source, self.commands.mountpoint, "--foreground")
        return self.commands.start(*mounting, *options)

    def until(self, holds: Callable[[Message], bool]) -> Message:
        """The first message, of those not seen yet, for which it holds."""
        deadline = time.monotonic() + GENEROUS
        with self._arrived:
            while True:
                while self._seen < len(self.had):
                    self._seen += 1
                    if holds(self.had[self._seen - 1][1]):
                        return self.had[self._seen - 1][1]
                left = deadline - time.monotonic()
                assert self._arrived.wait(left), f"not within {GENEROUS} s: {self.had[-5:]}"

    def ready(self) -> None:
        self.until(lambda message: message.get("READY") == "1")

    def status(self, *words: str) -> str:
        """Until the status has all these words."""
        return self.until(lambda m: all(word in m.get("STATUS", "") for word in words))["STATUS"]


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@healfs-test-{os.getpid()}"


@pytest.fixture
def manager(commands: Commands, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"), commands)
    yield made
    made.close()


def _worker(keeper: int) -> int:
    """Its one child: asked of the kernel, because a worker that is held answers nothing."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


def test_ready_comes_when_the_disk_is_usable_and_stopping_at_its_end(
    commands: Commands, image: Path, address: str
) -> None:
    absent = nbdkit("file", str(image))
    manager = Manager(address, commands)
    try:
        running = manager.start(absent.uri())
        assert "waiting for" in manager.status("nbd+unix")
        assert not any("READY" in message for _, message in manager.had)
        absent.start()
        manager.ready()
        one = Agent(commands.file)
        assert one.ok("pread", 0, 512) == bytes(512)
        environment = Path(f"/proc/{_worker(running.pid)}/environ").read_text()
        assert "NOTIFY_SOCKET" not in environment  # it is meant for the keeper alone
        manager.until(lambda message: message.get("STATUS") == "ready")
        one.kill()
        one.ended()
        running.send_signal(signal.SIGTERM)
        manager.until(lambda message: message.get("STOPPING") == "1")
        said, errors = running.communicate(timeout=GENEROUS)
        assert (running.returncode, said) == (0, f"{commands.file}\n"), errors
        commands.nothing_left()
        flags = [set(message) & {"READY", "STOPPING", "WATCHDOG"} for _, message in manager.had]
        assert [flag for flag in flags if flag] == [{"READY"}, {"STOPPING"}]
    finally:
        absent.close()
        manager.close()


def test_stopped_while_it_waits_it_says_so(manager: Manager, tmp_path: Path) -> None:
    running = manager.start(f"nbd+unix:///?socket={tmp_path / 'never'}")
    manager.status("waiting for")
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=GENEROUS)
    assert running.returncode == 130  # the unit's SuccessExitStatus
    assert errors.splitlines()[-1] == "healfs: interrupted; nothing is mounted"
    manager.commands.nothing_left()


def test_the_status_follows_an_outage(manager: Manager, server: NbdServer) -> None:
    manager.start(server.uri())
    manager.ready()
    writer = Agent(manager.commands.file)
    try:
        server.kill()
        writer.ask("pwrite", 0, BLOCK)
        status = manager.status("stalled since", "1 request waits (")
        assert not any(ord(c) < 32 for c in status)
        server.start()
        assert writer.answer().value == 4096
        manager.until(lambda message: message.get("STATUS") == "ready")
    finally:
        writer.kill()
        writer.ended()
    times = [at for at, _ in manager.had]
    assert len(times) <= 4 + 2 * (times[-1] - times[0])  # no message for each retry


def test_a_worker_that_hangs_starves_the_watchdog_until_it_is_replaced(
    manager: Manager, image: Path
) -> None:
    manager.commands.environment |= {"WATCHDOG_USEC": "30000000"}
    running = manager.start(image)
    manager.ready()
    manager.until(lambda message: message.get("WATCHDOG") == "1")
    one = Agent(manager.commands.file)
    worker = _worker(running.pid)
    try:
        os.kill(worker, signal.SIGSTOP)
        held = time.monotonic()
        one.ask("pwrite", 0, BLOCK)
        assert one.answer().value == 4096  # of another worker's
        assert _worker(running.pid) != worker
        manager.until(lambda message: message.get("STATUS") == "ready")
    finally:
        one.kill()
        one.ended()
    fed = [at for at, message in manager.had if message.get("WATCHDOG") == "1"]
    gaps = [later - at for at, later in itertools.pairwise(fed)]
    assert fed[-1] > held and 10 < max(gaps) < 30  # the limit is half of the 30 s


@pytest.mark.parametrize("kernel", ["this", "before 6.9"])
def test_the_watchdog_of_a_disk_that_nobody_uses_is_fed(
    manager: Manager, image: Path, kernel: str
) -> None:
    """By the keeper alone; where no worker could be replaced, too."""
    manager.commands.environment |= {"WATCHDOG_USEC": "12000000"}
    if kernel != "this":
        manager.commands.environment["PYTHONPATH"] = str(ROOT / "tests/fuse/old_kernel")
    manager.start(image)
    manager.ready()
    for _ in range(6):
        manager.until(lambda message: message.get("WATCHDOG") == "1")
    fed = [at for at, message in manager.had if message.get("WATCHDOG") == "1"]
    assert max(later - at for at, later in itertools.pairwise(fed)) < 12
