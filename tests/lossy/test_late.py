"""A write that lands after its connection has ended: it never overwrites newer data (promise 4).

The server takes the old write, neither carries it out nor answers it, and lets it land when the
test says so: after the reconnect, and after the newer write was asked for.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.conftest import Opener
from tests.fuse.control import ANSWER, Control, control
from tests.lossy.rig import LossyServer

OLD, NEW = b"o" * 4096, b"n" * 4096
LOST_WAYS = ["kill", "reconnect"]
LONG = 240.0  # seconds of settle time that no test waits for


def _lose(way: str, server: LossyServer, disk: Control) -> None:
    """The connection ends with the old write in the server's hands."""
    if way == "kill":
        server.kill()
        server.start()
    else:
        disk.execute("healfs-reconnect")


def _old_write_is_taken(server: LossyServer, writer: Agent) -> None:
    server.set(hold=1)
    writer.ask("pwrite", 0, OLD)
    server.until("held", 1)


@pytest.mark.parametrize("way", LOST_WAYS)
def test_the_newer_write_waits_and_stays(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener, way: str
) -> None:
    settle = 12.0
    mount = healfs_mount(server.uri(), "--settle", f"{settle:g}s")
    old, new, other = agent(mount.file), agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _old_write_is_taken(server, old)
        lost_at = time.monotonic()
        _lose(way, server, disk)
        # The same bytes go again at once; only what is newer waits.
        assert old.answer(ANSWER).value == 4096
        if time.monotonic() > lost_at + settle / 2:
            pytest.skip("this machine is too busy to say what waits")
        assert other.ok("pread", 0, 4096) == OLD  # a read does not wait
        new.ask("pwrite", 0, NEW)
        status = disk.until(lambda s: s["requests"]["parked"] == 1)
        assert status["state"] == "ready" and status["requests"]["unsettled"] == 1
        assert other.ok("pwrite", 8192, NEW) == 4096  # other ranges flow on
        assert not new.answered
        server.set(land=True)
        assert new.answer().value == 4096
        assert time.monotonic() >= lost_at + settle
        assert disk.status()["requests"]["unsettled"] == 0
        (late,) = server.landed_late()
        assert late.at < lost_at + settle
        assert new.ok("pread", 0, 4096) == NEW
        new.ok("fsync")
    assert stable.read_bytes()[:4096] == NEW


def test_without_settle_time_the_newer_data_is_gone(
    server: LossyServer, healfs_mount: Mounter, agent: Opener
) -> None:
    """The control: the late write does harm where nothing waits for it."""
    mount = healfs_mount(server.uri(), "--settle", "0")
    old, new = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _old_write_is_taken(server, old)
        _lose("kill", server, disk)
        assert old.answer().value == 4096
        assert new.ok("pwrite", 0, NEW) == 4096
        server.set(land=True)
        assert new.ok("pread", 0, 4096) == OLD


def test_a_newer_write_that_waited_behind_the_old_one_waits_on(
    server: LossyServer, healfs_mount: Mounter, agent: Opener
) -> None:
    """It was asked for before the connection was lost, partly over the old one."""
    mount = healfs_mount(server.uri(), "--settle", "8s")
    old, new = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _old_write_is_taken(server, old)
        new.ask("pwrite", 2048, NEW)
        disk.until(lambda s: s["requests"]["parked"] == 1)
        lost_at = time.monotonic()
        _lose("kill", server, disk)
        assert old.answer().value == 4096
        server.set(land=True)
        assert new.answer().value == 4096
        assert time.monotonic() >= lost_at + 8
        assert new.ok("pread", 0, 8192) == OLD[:2048] + NEW + bytes(2048)


def test_a_fence_settles_at_once(
    server: LossyServer, tmp_path: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    seen = tmp_path / "environment"
    # A real one: what is held can land no more.
    fence = f"env > {seen}; rm {server.handover}"
    mount = healfs_mount(server.uri(), "--fence", fence)
    old, new = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _old_write_is_taken(server, old)
        _lose("kill", server, disk)
        assert old.answer().value == 4096
        # No settle time goes with a fence: it alone decides, and so it has decided now.
        assert new.ok("pwrite", 0, NEW) == 4096
        server.set(land=True)
        assert not server.landed_late()
        assert new.ok("pread", 0, 4096) == NEW
        assert disk.status()["requests"]["unsettled"] == 0
    variables = dict(line.partition("=")[::2] for line in seen.read_text().splitlines())
    assert variables["HEALFS_SOURCE"] == server.uri()
    assert any(name.startswith("HEALFS_IDENTITY_") for name in variables)


def test_a_fence_that_fails_keeps_the_range_waiting(
    server: LossyServer, tmp_path: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    marker = tmp_path / "fenced"
    fence = f"test -e {marker} || {{ echo the array is away >&2; exit 3; }}"
    mount = healfs_mount(server.uri(), "--fence", fence, "--retry-interval", "200ms")
    old, new = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _old_write_is_taken(server, old)
        _lose("kill", server, disk)
        assert old.answer().value == 4096
        new.ask("pwrite", 0, NEW)
        for _ in range(3):  # it is tried again and again
            reason = disk.event("HEALFS_FENCE_FAILED")["data"]["reason"]
            assert "3" in reason and "the array is away" in reason
        status = disk.until(lambda s: s["requests"]["parked"] == 1)
        assert status["requests"]["unsettled"] == 1 and not new.answered
        server.set(land=True)
        marker.touch()
        assert new.answer().value == 4096
        assert new.ok("pread", 0, 4096) == NEW


def test_a_fence_that_is_gone_is_told_and_waited_for(
    server: LossyServer, tmp_path: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    command, away = tmp_path / "fence-agent", tmp_path / "away"
    command.write_text("#!/bin/sh\nexit 0\n")
    command.chmod(0o700)
    mount = healfs_mount(server.uri(), "--fence", str(command), "--retry-interval", "200ms")
    old, new = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        command.rename(away)
        _old_write_is_taken(server, old)
        _lose("kill", server, disk)
        new.ask("pwrite", 0, NEW)
        assert "not found" in disk.event("HEALFS_FENCE_FAILED")["data"]["reason"]
        assert not new.answered
        away.rename(command)
        assert new.answer().value == 4096


def test_a_hung_connection_is_given_up_by_the_operator(
    server: LossyServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--slow-after", "3s", "--settle", "2s")
    writer, reader = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        server.set(hang=True)
        writer.ask("pwrite", 0, OLD)
        reader.ask("pread", 4096, 4096)
        server.until("held", 2)
        status = disk.state("stalled")
        assert "no answer" in status["reason"] and status["totals"]["reconnects"] == 0
        server.set(hang=False)  # for the next connection; this one stays as it is
        assert not writer.answered and not reader.answered
        disk.execute("healfs-reconnect")
        assert writer.answer().value == 4096
        assert reader.answer().value == bytes(4096)
        status = disk.state("ready")
        assert status["totals"]["reconnects"] == 1 and status["outages"]["count"] == 1
        assert status["requests"]["unsettled"] <= 1  # the write; never the read
        disk.until(lambda s: s["requests"]["unsettled"] == 0)


def test_an_answer_that_comes_late_settles(
    server: LossyServer, healfs_mount: Mounter, agent: Opener
) -> None:
    """The time is over for the guest, not for the range: what it wrote may still land."""
    mount = healfs_mount(server.uri(), "--slow-after", "300ms", "--write-retry-timeout", "1s")
    old, new = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _old_write_is_taken(server, old)
        assert old.answer().errno
        assert disk.status()["requests"]["unsettled"] == 1
        mount.policy("--write-retry-timeout", "0")
        new.ask("pwrite", 0, NEW)
        disk.until(lambda s: s["requests"]["parked"] == 1)
        server.set(release=True)
        assert new.answer().value == 4096
        assert disk.status()["requests"]["unsettled"] == 0
        assert new.ok("pread", 0, 4096) == NEW


def _in_flight(disk: Control, count: int) -> None:
    disk.until(lambda status: status["requests"]["in_flight"] == count)


def test_what_the_socket_never_took_is_not_unsettled(
    server: LossyServer, healfs_mount: Mounter, agent: Opener
) -> None:
    """A server that reads nothing takes a part of the queue; the rest cannot land."""
    mount = healfs_mount(server.uri(), "--settle", f"{LONG:g}s", "--slow-after", "1h")
    writers = [agent(mount.file) for _ in range(12)]  # of more than the socket takes
    step = 1 << 20
    length = step - 4096  # one request, wherever in its page the writer's buffer begins
    with control(mount) as disk:
        server.pause()
        for number, writer in enumerate(writers):
            writer.ask("pwrite", number * step, b"o" * length)
            _in_flight(disk, number + 1)
        server.kill()
        server.start()
        for writer in writers:
            assert writer.answer().value == length
        unsettled = disk.status()["requests"]["unsettled"]
        assert 0 < unsettled < len(writers)
        # The last one was never taken: a newer write to its range waits for nothing.
        assert writers[0].do("pwrite", 11 * step, NEW, seconds=LONG / 2).value == 4096
