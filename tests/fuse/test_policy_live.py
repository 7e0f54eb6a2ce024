"""Policy changes while requests wait: each acts on what is parked already."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from healfs.control.client import ControlError
from tests.backends.nbd_servers import NbdServer, nbdkit
from tests.conftest import Mounter
from tests.fuse.conftest import Opener, Rules
from tests.fuse.control import ANSWER, control

BLOCK = b"x" * 4096


def test_report_answers_the_waiting_and_retry_parks_the_next(
    server: NbdServer, image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    first, second, reader = (agent(mount.file) for _ in range(3))
    with control(mount) as disk:
        server.kill()
        first.ask("pwrite", 0, BLOCK)
        reader.ask("pread", 8192, 512)
        disk.parked(2)
        assert not first.answered
        mount.policy("--werror", "report")
        assert first.answer(ANSWER).errno == errno.EIO
        # The other direction still waits; the next write gets its error at once.
        assert first.do("pwrite", 0, BLOCK, seconds=ANSWER).errno == errno.EIO
        assert disk.status()["requests"]["parked"] == 1 and not reader.answered
        mount.policy("--werror", "retry")
        second.ask("pwrite", 4096, BLOCK)
        disk.parked(2)
        assert disk.status()["state"] == "stalled" and not second.answered
        server.start()
        assert second.answer().value == 4096
        assert reader.answer().value == bytes(512)
        status = disk.state("ready")
    assert status["outages"]["count"] == 1 and status["totals"]["write"]["errors"] == 2
    # The write that was answered with an error in the outage never landed.
    assert image.read_bytes()[:8192] == bytes(4096) + BLOCK


@pytest.mark.parametrize("way", ["cont", "policy"])
def test_stop_holds_until_cont_or_another_policy(
    server: NbdServer, healfs_mount: Mounter, agent: Opener, way: str
) -> None:
    mount = healfs_mount(server.uri(), "--werror", "stop")
    writer, later = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        server.kill()
        writer.ask("pwrite", 0, BLOCK)
        assert disk.event("BLOCK_IO_ERROR")["data"]["action"] == "stop"
        disk.event("STOP")
        assert disk.execute("query-status") == {"running": False, "status": "io-error"}
        server.start()
        reconnects = disk.until(lambda status: status["totals"]["reconnects"] == 1)
        assert reconnects["state"] == "paused"  # the backend is back, and that is not enough
        later.ask("pread", 0, 512)
        disk.parked(2)
        assert not writer.answered and not later.answered
        if way == "cont":
            disk.execute("cont")
        else:
            mount.policy("--werror", "retry")
        disk.event("RESUME")
        assert writer.answer().value == 4096
        assert later.answer().errno == 0
        assert disk.state("ready")["requests"]["parked"] == 0


def test_cont_while_the_backend_is_away_stops_again(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--werror", "stop")
    writer = agent(mount.file)
    with control(mount) as disk:
        server.kill()
        writer.ask("pwrite", 0, BLOCK)
        disk.event("STOP")
        disk.execute("cont")
        disk.event("RESUME")
        disk.event("STOP")
        assert disk.state("paused") and not writer.answered
        server.start()
        disk.until(lambda status: status["totals"]["reconnects"] == 1)
        disk.execute("cont")
        assert writer.answer().value == 4096


def test_qmp_stop_answers_at_once_in_an_outage(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    writer = agent(mount.file)
    with control(mount) as disk:
        server.kill()
        writer.ask("pwrite", 0, BLOCK)
        disk.parked(1)
        disk.execute("stop")
        disk.event("STOP", seconds=ANSWER)
        disk.event("HEALFS_DRAINED", seconds=ANSWER)
        assert disk.execute("query-status") == {"running": False, "status": "paused"}
        server.start()
        disk.until(lambda status: status["totals"]["reconnects"] == 1)
        # What the policy of an operator's pause is does not matter: only cont ends it.
        mount.policy("--werror", "report")
        assert disk.status()["state"] == "paused" and not writer.answered
        disk.execute("cont")
        assert writer.answer().value == 4096


def test_qmp_stop_tells_of_the_drain_when_the_hanging_request_is_answered(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--slow-after", "1s")
    writer, later = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        server.pause()
        writer.ask("pwrite", 0, BLOCK)
        disk.until(lambda status: status["requests"]["in_flight"] == 1)
        disk.state("stalled")
        disk.execute("stop")
        disk.event("STOP")
        later.ask("pwrite", 8192, BLOCK)
        disk.parked(1)
        with pytest.raises(ControlError):
            disk.event("HEALFS_DRAINED", seconds=0.2)
        server.resume()
        disk.event("HEALFS_DRAINED")
        assert writer.answer().value == 4096
        assert not later.answered
        disk.execute("cont")
        assert later.answer().value == 4096


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MiB on a loop device, with less room than a disk wants."""
    device, where = tmp_path / "small.ext4", tmp_path / "small"
    with open(device, "xb") as file:
        file.truncate(24 << 20)
    where.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", device], check=True, timeout=240)
    done = subprocess.run(
        ["mount", "-o", "loop", device, where], capture_output=True, text=True, timeout=240
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", where], check=True, timeout=240)


@pytest.mark.parametrize("policy", ["enospc", "retry"])
def test_a_full_file_system_below_is_waited_for(
    small_file_system: Path, healfs_mount: Mounter, agent: Opener, policy: str
) -> None:
    disk_file = small_file_system / "disk.img"
    with open(disk_file, "xb") as file:
        file.truncate(64 << 20)
    filler = small_file_system / "filler"
    filler.write_bytes(bytes(8 << 20))
    os.sync()
    mount = healfs_mount(disk_file, "--werror", policy)
    writer, reader = agent(mount.file), agent(mount.file)
    chunk = bytes(range(256)) * 4096  # 1 MiB, which no file system stores as a hole
    written = 0
    with control(mount) as disk:
        while True:
            writer.ask("pwrite", written, chunk)
            disk.until(lambda status: status["requests"]["parked"] or writer.answered)
            if not writer.answered:
                break
            assert writer.answer().value == len(chunk)
            written += len(chunk)
            assert written < 24 << 20, "the file system below is never full"
        told = disk.event("BLOCK_IO_ERROR")["data"]
        assert told["nospace"] and told["operation"] == "write"
        assert not writer.answered
        if policy == "enospc":
            assert told["action"] == "stop" and disk.status()["state"] == "paused"
            assert disk.execute("query-block")[0]["io-status"] == "nospace"
        else:
            # One request waits; the disk does not.
            assert told["action"] == "retry" and disk.status()["state"] == "ready"
            assert reader.ok("pread", 0, 1 << 20) == chunk
        filler.unlink()
        os.sync()
        if policy == "enospc":
            disk.execute("cont")
        assert writer.answer().value == len(chunk)
        writer.ok("fsync")
    assert disk_file.read_bytes()[: written + len(chunk)] == chunk * (written // len(chunk) + 1)


def test_enospc_reports_any_other_error(
    image: Path, tmp_path: Path, fault: Rules, healfs_mount: Mounter, agent: Opener
) -> None:
    fault('[[rule]]\nkinds = ["WRITE"]\nerrno = "EREMOTEIO"\n')
    mount = healfs_mount(image, "--fault", str(tmp_path / "faults.toml"), "--werror", "enospc")
    assert agent(mount.file).do("pwrite", 0, BLOCK).errno == errno.EREMOTEIO
    assert mount.status()["state"] == "ready"


@pytest.mark.parametrize("then", ["report", "stop", "enospc", "ignore"])
def test_when_the_retry_timeout_runs_out_then_decides(
    server: NbdServer, image: Path, healfs_mount: Mounter, agent: Opener, then: str
) -> None:
    image.write_bytes(b"\xff" * (1 << 20) + bytes((16 << 20) - (1 << 20)))
    mount = healfs_mount(server.uri(), "--retry-timeout", "2s", "--then", then)
    writer, reader = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        server.kill()
        disk.state("stalled")
        writer.ask("pwrite", 0, BLOCK)
        reader.ask("pread", 4096, 512)
        if then == "stop":
            assert disk.state("paused")["outages"]["current_seconds"] >= 2
            assert not writer.answered and not reader.answered
            server.start()
            disk.until(lambda status: status["totals"]["reconnects"] == 1)
            disk.execute("cont")
            assert writer.answer().value == 4096
            assert reader.answer().value == b"\xff" * 512
            return
        answer = writer.answer()
        assert disk.status()["outages"]["current_seconds"] >= 2
        if then == "ignore":
            assert answer.value == 4096 and reader.answer().value == bytes(512)
            # Who is told that data is stable acts on it: a flush is reported.
            assert writer.do("fsync", seconds=ANSWER).errno == errno.EIO
        else:
            assert answer.errno == errno.EIO  # enospc reports what is not ENOSPC
            if then == "report":
                assert reader.answer().errno == errno.EIO
            else:  # there is no enospc for reads: they have their own `then`
                assert reader.answer().errno == errno.EIO
        # The time is up for the whole outage, not for each request.
        took: list[float] = []
        while min(took, default=2) >= 2:  # a busy machine adds some, at times
            assert len(took) < 10, took
            before = time.monotonic()
            assert writer.do("pwrite", 0, BLOCK).errno == answer.errno
            took.append(time.monotonic() - before)
        server.start()
        disk.state("ready")
        assert writer.ok("pread", 0, 512) == b"\xff" * 512


def test_the_timeout_counts_from_the_start_of_the_outage(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--read-retry-timeout", "14s")
    reader, writer = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        server.kill()
        disk.state("stalled")
        writer.ask("pwrite", 0, BLOCK)
        disk.until(lambda status: status["outages"]["current_seconds"] >= 11)
        assert not writer.answered
        reader.ask("pread", 0, 512)
        assert reader.answer().errno == errno.EIO
        # Counted from the request, it would be 25 at the least.
        assert 14 <= disk.status()["outages"]["current_seconds"] < 25
        assert not writer.answered  # writes have no time-out
        server.start()
        assert writer.answer().value == 4096


def test_a_hang_counts_from_the_sending_of_the_oldest_request(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--slow-after", "1s", "--retry-timeout", "10s")
    reader = agent(mount.file)
    with control(mount) as disk:
        server.pause()
        reader.ask("pread", 0, 512)
        status = disk.state("stalled")
        assert status["requests"] == {"in_flight": 1, "parked": 0, "unsettled": 0}
        assert status["outages"]["current_seconds"] >= 1
        assert reader.answer().errno == errno.EIO
        status = disk.status()
        assert status["outages"]["current_seconds"] >= 10
        # It is still in the server's hands.
        assert status["requests"] == {"in_flight": 0, "parked": 0, "unsettled": 1}
        server.resume()
        disk.until(lambda s: s["requests"]["unsettled"] == 0 and s["state"] == "ready")
        assert reader.ok("pread", 0, 512) == bytes(512)


def test_ignore_reads_zeroes_loses_writes_and_reports_flushes(
    server: NbdServer, image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    image.write_bytes(b"\xff" * (16 << 20))
    mount = healfs_mount(server.uri(), "--rerror", "ignore", "--werror", "ignore")
    one = agent(mount.file)
    with control(mount) as disk:
        server.kill()
        disk.state("stalled")
        assert one.ok("pread", 0, 512) == bytes(512)
        assert one.ok("pwrite", 0, BLOCK) == 4096
        assert one.do("fsync").errno == errno.EIO
        status = disk.status()
        assert status["totals"]["ignored_bytes"] == 512 + 4096
        assert status["totals"]["flush"]["errors"] == 1
        server.start()
        disk.state("ready")
        assert one.ok("pread", 0, 4096) == b"\xff" * 4096


def test_a_shorter_retry_interval_is_in_force_at_once(
    image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """Over TCP, where nothing tells that the server is back but the next try."""
    with nbdkit("file", str(image), tcp=True) as server:
        mount = healfs_mount(server.uri(), "--retry-interval", "1h")
        writer = agent(mount.file)
        with control(mount) as disk:
            server.kill()
            writer.ask("pwrite", 0, BLOCK)
            # 10 ms doubled, and doubled: between 20.5 s and 30.7 s there is no try.
            disk.until(lambda status: status["outages"]["current_seconds"] > 20.5)
            server.start()
            mount.policy("--retry-interval", "50ms")
            assert writer.answer(seconds=9).value == 4096
