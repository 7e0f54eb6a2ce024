"""Worker and server killed together, the server losing its cache: nothing answered is missing.

Each kill that counts is asserted to have lost answered writes of the server's.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.backends.nbd_servers import wait_until
from tests.conftest import Mounter
from tests.fuse.conftest import Opener
from tests.killpoints import IN_FLIGHT, SUCCESSOR, KillPoints
from tests.killpoints import kill_points as kill_points
from tests.lossy.conftest import Check
from tests.lossy.rig import SECONDS, Checker, LossyServer
from tests.mounts import HealfsMount

BLOCKS = 1024
SETTLE = 6.0  # seconds, in which a slow machine starts a server
WRITES = 150  # between two kills


class Pair:
    """A worker and a server under a load that remembers what was answered."""

    def __init__(
        self, server: LossyServer, healfs_mount: Mounter, checker: Check, points: KillPoints
    ) -> None:
        server.kill()
        server.late_delay = 0.05
        # A flush covers what came before it, not what was answered before it was.
        server.initial = {"flush_delay": 0.02, "flush_early": True}
        server.start()
        self.server = server
        self.points = points
        self.mount: HealfsMount = healfs_mount(server.uri(), "--settle", f"{SETTLE:g}s")
        self.load: Checker = checker(self.mount.file, blocks=BLOCKS)

    def flow(self) -> None:
        self.load.until("writes", self.load.ask("progress")["writes"] + WRITES)

    def at_random(self, hold: int) -> bool:
        """With `hold` writes taken that will land later. Whether the server lost any."""
        self.flow()
        worker = self.mount.status()["pids"]["worker"]
        if hold:
            self.server.set(hold=hold)
            self.server.until("held", 1)
        self.server.late_until(time.monotonic() + SETTLE * 0.7)
        os.kill(worker, signal.SIGKILL)
        return self._lose()

    def at(self, *names: str) -> bool:
        """The worker dies at the first point, its successor at the next, and then the server."""
        while True:  # again where nothing is to be replayed
            self.flow()
            self.points.arm(*((name, 40 if name in IN_FLIGHT else 1) for name in names))
            done = self.load.ask("progress")["writes"]
            if all(self._reached(name, done) for name in names):
                return self._lose()

    def _reached(self, name: str, done: int) -> bool:
        def decided() -> bool:
            return self.points.pending or self.load.ask("progress")["writes"] > done + 40 * WRITES

        wait_until(decided, f"the point {name}", SECONDS)
        return self.points.pending and self.points.reached(name) is not None

    def _lose(self) -> bool:
        self.server.kill()
        lost = bool(self.server.dropped())
        assert self.load.ask("stable", str(self.server.stable)) == {"lost": []}  # promise 2
        self.server.start()
        assert self.load.ask("check") == {"lost": [], "errors": []}  # promise 3
        return lost

    def end(self) -> None:
        assert self.load.ask("flush") == {"lost": [], "errors": []}
        assert self.load.ask("stop") == {"errors": []}
        progress = self.load.ask("progress")
        assert progress["flushes"] > 0 and progress["synchronous"] > 0
        self.load.close()
        self.mount.umount()
        self.server.kill()


def _at_random(pair: Pair, kills: int) -> None:
    lost, tries = 0, 0
    while lost < kills:  # one that comes just after a flush proves nothing, and does not count
        lost += pair.at_random(tries % 3)
        tries += 1
        assert tries < 3 * kills, "the server loses nothing"
    assert pair.server.landed_late(), "no write landed late"
    pair.end()


def _at_points(pair: Pair, kills: int) -> None:
    ways = [(name,) for name in IN_FLIGHT] + [("log-entry", name) for name in SUCCESSOR]
    lost = 0
    for _ in range(kills):
        for names in ways:
            lost += pair.at(*names)
    assert lost > kills * len(ways) / 2
    pair.end()


@pytest.fixture
def pair(
    server: LossyServer, healfs_mount: Mounter, checker: Check, kill_points: KillPoints
) -> Pair:
    return Pair(server, healfs_mount, checker, kill_points)


def test_five_kills_at_random(pair: Pair) -> None:
    _at_random(pair, 5)


def test_a_kill_at_each_point(pair: Pair) -> None:
    _at_points(pair, 1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_kills_at_random(pair: Pair) -> None:
    _at_random(pair, 100)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_kills_at_each_point(pair: Pair) -> None:
    _at_points(pair, 20)


def test_what_a_dead_worker_sent_holds_back_newer_writes(
    server: LossyServer,
    healfs_mount: Mounter,
    agent: Opener,
    tmp_path: Path,
) -> None:
    """The server has it, and may carry it out until it is fenced."""
    old, new = b"o" * 4096, b"n" * 4096
    marker = tmp_path / "fenced"
    mount = healfs_mount(server.uri(), "--fence", f"test -e {marker}", "--retry-interval", "200ms")
    first, second, other = (agent(mount.file) for _ in range(3))
    server.set(hold=1)
    first.ask("pwrite", 0, old)
    server.until("held", 1)
    mount.kill_worker()
    assert first.answer().value == 4096  # the same bytes go again at once
    second.ask("pwrite", 0, new)
    mount.wait_until(lambda status: status["requests"]["parked"] == 1)
    assert other.ok("pwrite", 8192, new) == 4096  # other ranges flow on
    mount.kill_worker()  # its successor knows it, too
    mount.wait_until(lambda status: status["requests"]["parked"] == 1)
    assert mount.status()["requests"]["unsettled"] and not second.answered
    server.set(land=True)
    assert server.landed_late()
    marker.touch()
    assert second.answer().value == 4096
    assert other.ok("pread", 0, 4096) == new
