"""A flush that fails, and what was written before it: no later flush succeeds until everything
it covered was written again and flushed (promise 5)."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.conftest import Opener
from tests.fuse.control import control
from tests.lossy.conftest import SIZE
from tests.lossy.rig import NO_REPLAY, SECONDS, FailingStore, LossyServer, broken

BLOCK = 4096
COUNT = 8  # blocks that are written before the flush
BAD = 3  # the block that is refused
DATA = b"".join(bytes([65 + number]) * BLOCK for number in range(COUNT))
REFUSED = [BAD * BLOCK, (BAD + 1) * BLOCK]


def _write(writer: Agent) -> None:
    for number in range(COUNT):
        part = DATA[number * BLOCK : (number + 1) * BLOCK]
        assert writer.ok("pwrite", number * BLOCK, part) == BLOCK


def _fsync_until_success(writer: Agent, error: int = errno.EIO) -> None:
    until = time.monotonic() + SECONDS
    while (answer := writer.do("fsync")).errno:
        assert answer.errno == error and time.monotonic() < until


def test_under_retry_fsync_succeeds_when_all_was_written_again(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--werror", "retry")
    writer = agent(mount.file)
    with control(mount) as disk:
        _write(writer)
        server.set(fail_flushes=1, drop=True)
        writer.ok("fsync")
        told = disk.event("BLOCK_IO_ERROR")["data"]
        assert told["operation"] == "write" and told["action"] == "retry"
        state = server.set()
        assert state["failed_flushes"] == 1 and state["dirty"] == 0
        assert disk.status()["totals"]["flush"]["errors"] == 0
        server.kill()
        assert stable.read_bytes()[: len(DATA)] == DATA


def test_without_the_log_fsync_lies(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener, tmp_path: Path
) -> None:
    """The control: the server does drop what it could not flush, and its next flush succeeds."""
    with broken(tmp_path, NO_REPLAY):
        mount = healfs_mount(server.uri(), "--werror", "retry")
    writer = agent(mount.file)
    _write(writer)
    server.set(fail_flushes=1, drop=True)
    writer.ok("fsync")
    assert stable.read_bytes()[: len(DATA)] == bytes(len(DATA))


def test_under_report_no_later_fsync_succeeds_until_all_landed(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--werror", "report", "--retry-interval", "100ms")
    writer, other = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _write(writer)
        server.set(fail_flushes=1, drop=True, refuse=[[*REFUSED, errno.EIO]])
        assert writer.do("fsync").errno == errno.EIO
        # The server's own flushes succeed again, and it has refused the block: fsync may not.
        server.until("refused", 3)
        for _ in range(3):
            assert writer.do("fsync").errno == errno.EIO
        assert server.set()["failed_flushes"] == 1 and server.set()["flushes"] > 0
        # The server has lost these bytes; healfs has not.
        assert other.ok("pread", 0, len(DATA)) == DATA
        assert other.ok("pread", BAD * BLOCK, BLOCK) == DATA[BAD * BLOCK :][:BLOCK]
        assert other.ok("pwrite", 1 << 20, DATA) == len(DATA)
        assert other.ok("pread", 1 << 20, len(DATA)) == DATA
        assert disk.status()["write_log"]["requests"] > 0
        server.set(refuse=[])
        _fsync_until_success(writer)
        server.kill()
        found = stable.read_bytes()
    assert found[: len(DATA)] == DATA and found[1 << 20 :][: len(DATA)] == DATA


@pytest.mark.parametrize("policy", ["retry", "report", "enospc", "stop"])
def test_an_entry_refused_in_replay(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener, policy: str
) -> None:
    """The server comes back without its cache and without room for one of the blocks."""
    mount = healfs_mount(server.uri(), "--werror", policy, "--retry-interval", "100ms")
    writer, other = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        _write(writer)
        server.set()  # its journal comes after its answer
        server.kill()
        assert len(server.dropped()) == COUNT
        server.initial = {"refuse": [[*REFUSED, errno.ENOSPC]]}
        server.start()
        server.until("refused", 2)
        disk.state("ready")
        assert other.ok("pread", 0, len(DATA)) == DATA
        assert other.ok("pwrite", 1 << 20, DATA) == len(DATA)
        writer.ask("fsync")
        if policy == "report":
            assert writer.answer().errno == errno.ENOSPC
        elif policy in ("enospc", "stop"):
            status = disk.state("paused")
            assert disk.execute("query-block")[0]["io-status"] == "nospace"
        else:
            status = disk.parked(1)
            assert status["state"] in ("ready", "replaying")
            assert other.ok("pread", 1 << 20, BLOCK) == DATA[:BLOCK]
        server.set(refuse=[])
        if policy == "report":
            _fsync_until_success(writer, errno.ENOSPC)
        else:
            assert not writer.answered
            if policy != "retry":
                disk.execute("cont")
            assert writer.answer().errno == 0
        server.kill()
        found = stable.read_bytes()
    assert found[: len(DATA)] == DATA and found[1 << 20 :][: len(DATA)] == DATA


def test_a_newer_write_replaces_a_part_of_what_was_refused(
    server: LossyServer, stable: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """The older bytes come later than the newer ones, and must not be put over them."""
    mount = healfs_mount(server.uri(), "--retry-interval", "100ms")
    writer = agent(mount.file)
    with control(mount) as disk:
        assert writer.ok("pwrite", 0, DATA) == len(DATA)  # one entry of eight blocks
        server.kill()
        server.initial = {"refuse": [[*REFUSED, errno.EIO]]}
        server.start()
        server.until("refused", 2)
        disk.state("ready")
        newer = b"n" * BLOCK
        assert writer.ok("pwrite", 0, newer) == BLOCK
        expected = newer + DATA[BLOCK:]
        assert writer.ok("pread", 0, len(DATA)) == expected
        server.kill()
        server.initial = {}
        server.start()
        writer.ok("fsync")
        assert writer.ok("pread", 0, len(DATA)) == expected
        server.kill()
        assert stable.read_bytes()[: len(DATA)] == expected


# --- a block device whose medium fails ----------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FailingStore]:
    made = FailingStore(tmp_path, SIZE)
    yield made
    made.close()


@pytest.mark.parametrize("policy", ["retry", "report"])
def test_a_failed_fsync_of_a_block_device(
    store: FailingStore, healfs_mount: Mounter, agent: Opener, policy: str
) -> None:
    mount = healfs_mount(store.device, "--werror", policy, "--retry-interval", "100ms")
    writer = agent(mount.file)
    with control(mount) as disk:
        _write(writer)
        store.tell("fail-fsync")
        writer.ask("fsync")
        told = disk.event("BLOCK_IO_ERROR")["data"]
        assert told["operation"] == "write" and told["action"] == policy
        if policy == "report":
            assert writer.answer().errno == errno.EIO
            assert writer.do("fsync").errno == errno.EIO
        assert store.said("dropped")
        assert store.medium.read_bytes()[: len(DATA)] == bytes(len(DATA))
        assert not writer.answered
        store.tell("")
        if policy == "report":
            _fsync_until_success(writer)
        else:
            assert writer.answer().errno == 0
        assert store.medium.read_bytes()[: len(DATA)] == DATA
        assert writer.ok("pread", 0, len(DATA)) == DATA
        disk.state("ready")
    writer.kill()
    writer.ended()
    mount.umount()


def test_a_failed_write_of_a_block_device(
    store: FailingStore, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(store.device, "--retry-interval", "100ms")
    writer, reader = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        store.tell("fail-write")
        writer.ask("pwrite", 0, DATA)
        disk.until(lambda status: status["totals"]["retries"] >= 2)
        assert reader.ok("pread", 1 << 20, BLOCK) == bytes(BLOCK)
        assert not writer.answered and store.said("refused")
        store.tell("")
        assert writer.answer().value == len(DATA)
        writer.ok("fsync")
        assert store.medium.read_bytes()[: len(DATA)] == DATA
    for one in writer, reader:
        one.kill()
        one.ended()
    mount.umount()
