"""The write log is bounded: healfs flushes before it is full, and when it is full, writes wait."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mounter
from tests.fuse.conftest import Opener
from tests.fuse.control import Control, control
from tests.lossy.conftest import SIZE
from tests.lossy.rig import LossyServer

MIB = 1 << 20


def _fio(file: Path, block: str) -> subprocess.Popen[str]:
    """Writes all of the disk without a flush, then reads it back and compares."""
    return subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "timeout", "-s", "KILL", "600"),
            *("fio", "--name=bounds", f"--filename={file}", "--allow_file_create=0"),
            *("--ioengine=libaio", "--direct=1", "--invalidate=0", "--fallocate=none"),
            *("--rw=randwrite", f"--bs={block}", f"--size={SIZE >> 20}M", "--iodepth=64"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("option", "block", "unit"),
    [(("--log-size", "4M"), "64k", "bytes"), (("--log-entries", "1024"), "4k", "requests")],
)
def test_writes_wait_while_the_log_is_full(
    server: LossyServer,
    healfs_mount: Mounter,
    option: tuple[str, str],
    block: str,
    unit: str,
) -> None:
    server.set(flush_delay=0.3)
    mount = healfs_mount(server.uri(), *option, "--slow-after", "1h")
    with control(mount) as disk:
        load = _fio(mount.file, block)

        def is_full(disk: Control) -> bool:
            """Nothing is in the server's hands but the flush, and writes wait."""
            status = disk.status()
            log, requests = status["write_log"], status["requests"]
            assert log[unit] <= log[f"limit_{unit}"]
            return bool(requests["parked"] >= 16 and log[unit] * 2 > log[f"limit_{unit}"])

        times = 0
        while load.poll() is None and times < 3:
            times += is_full(disk)
        said, _ = load.communicate(timeout=600)
        assert load.returncode == 0, said
        assert times == 3, "the log was never full"
        status = disk.status()
        assert status["totals"]["flush"]["requests"] == 0  # fio sent none
        assert server.set()["flushes"] >= 3
        assert status["outages"]["count"] == 0


def test_a_flush_of_its_own_at_half(
    server: LossyServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--log-size", "4M")
    writer = agent(mount.file)
    chunk = bytes(64 << 10)
    with control(mount) as disk:
        limit = disk.status()["write_log"]["limit_bytes"]
        assert limit == 4 * MIB
        written = 0
        while not server.set()["flushes"]:
            assert writer.ok("pwrite", written, chunk) == len(chunk)
            written += len(chunk)
        # At half, give or take what the ring loses to alignment and the write on its way.
        assert limit * 3 // 8 <= written <= limit * 5 // 8
        disk.until(lambda status: status["write_log"]["bytes"] < MIB)


def test_what_is_in_a_full_log_is_not_lost(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """The server hangs in its flush, and dies with all of the log in its cache."""
    mount = healfs_mount(server.uri(), "--log-size", "4M")
    writer = agent(mount.file)
    server.set(flush_delay=1000)
    with control(mount) as disk:
        block = 0
        while True:
            writer.ask("pwrite", block << 16, bytes([block + 1]) * (64 << 10))
            disk.until(lambda status: writer.answered or status["requests"]["parked"])
            if not writer.answered:
                break
            assert writer.answer().value == 64 << 10
            block += 1
            assert block << 16 < SIZE, "the log is never full"
        limits = disk.status()["write_log"]
        assert limits["bytes"] <= limits["limit_bytes"] == 4 * MIB
        server.kill()
        assert len(server.dropped()) == block
        server.start()
        assert writer.answer().value == 64 << 10
        writer.ok("fsync")
        server.kill()
    found = stable.read_bytes()
    for number in range(block + 1):
        assert found[number << 16 : (number + 1) << 16] == bytes([number + 1]) * (64 << 10)


def test_a_flush_covers_what_came_before_it_only(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """Writes that are answered while a flush is on its way are not made stable by it. (A guest's
    FSYNC holds the kernel's inode lock: only a flush of healfs's own has such company.)"""
    mount = healfs_mount(server.uri(), "--log-size", "4M")
    writer = agent(mount.file)
    length = 64 << 10
    server.set(flush_delay=8, flush_early=True)
    with control(mount) as disk:
        block = 0
        covered = -1
        while covered < 0 or block < covered + 4:
            writer.ok("pwrite", block * length, bytes([block + 1]) * length)
            block += 1
            if covered < 0 and server.set()["flushes"]:
                covered = block
        assert disk.status()["write_log"]["requests"] == block  # it is not answered yet
        disk.until(lambda status: status["write_log"]["requests"] < block)
        server.kill()
        assert len(server.dropped()) >= 4
        server.start()
        writer.ok("fsync")
        server.kill()
    found = stable.read_bytes()
    for number in range(block):
        assert found[number * length :][:length] == bytes([number + 1]) * length
