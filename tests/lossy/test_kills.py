"""kill -9 of a server that loses what it has not flushed: nothing that was answered is lost.

Each kill is asserted to have lost answered writes, else the test would prove nothing; and with
the replay broken on purpose the same checker finds lost blocks.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import Mounter
from tests.fuse.control import Control, control
from tests.lossy.conftest import Check
from tests.lossy.rig import NO_REPLAY, Checker, LossyServer, broken

BLOCKS = 1024
SETTLE = 6.0  # seconds, in which a slow machine starts a server
WRITES = 150  # between two kills


def _kill(server: LossyServer, load: Checker, hold: int) -> int:
    """In full flight, with `hold` writes taken that will land later; returns what was lost."""
    load.until("writes", load.ask("progress")["writes"] + WRITES)
    if hold:
        server.set(hold=hold)
        # Not all of them: a thread's fsync may wait in the kernel for a write that is held, and
        # all other threads behind it.
        server.until("held", 1)
    # Not at the very end of the settle time: what the kernel does not run cannot look at a clock.
    server.late_until(time.monotonic() + SETTLE * 0.7)
    server.kill()
    return len(server.dropped())


def _through_kills(server: LossyServer, healfs_mount: Mounter, checker: Check, kills: int) -> None:
    server.kill()
    server.late_delay = 0.05
    # A flush covers what came before it, not what was answered before it was.
    server.initial = {"flush_delay": 0.02, "flush_early": True}
    server.start()
    mount = healfs_mount(server.uri(), "--settle", f"{SETTLE:g}s", "--slow-after", "1h")
    load = checker(mount.file, blocks=BLOCKS)
    lost, tries = 0, 0
    while lost < kills:  # a kill that comes just after a flush proves nothing, and does not count
        lost += _kill(server, load, tries % 3) > 0
        tries += 1
        assert tries < 2 * kills, "the server loses nothing"
        # Promise 2, where it counts: on what is left of the server.
        assert load.ask("stable", str(server.stable)) == {"lost": []}
        server.start()
        if tries % 3 == 2:
            assert load.ask("check") == {"lost": [], "errors": []}  # promise 3
    assert load.ask("flush") == {"lost": [], "errors": []}
    assert load.ask("stop") == {"errors": []}
    progress = load.ask("progress")
    assert progress["flushes"] > kills and progress["synchronous"] > 0
    assert server.landed_late(), "no write landed late"
    status = mount.status()
    assert status["outages"]["count"] == tries
    load.close()
    mount.umount()
    server.kill()


def test_a_checker_through_ten_kills(
    server: LossyServer, healfs_mount: Mounter, checker: Check
) -> None:
    _through_kills(server, healfs_mount, checker, 10)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_checker_through_a_hundred_kills(
    server: LossyServer, healfs_mount: Mounter, checker: Check
) -> None:
    _through_kills(server, healfs_mount, checker, 100)


def test_the_checker_finds_what_is_lost_without_a_replay(
    server: LossyServer, healfs_mount: Mounter, checker: Check, tmp_path: Path
) -> None:
    with broken(tmp_path, NO_REPLAY):
        mount = healfs_mount(server.uri())
    load = checker(mount.file, blocks=BLOCKS)
    lost = 0
    for _ in range(5):  # of few writes that are gone, all may have been written anew since
        lost += _kill(server, load, 0)
        server.start()
        if load.ask("check")["lost"]:
            break
    else:
        raise AssertionError(f"it has not seen that {lost} writes are gone")
    # And the flush that succeeds lies about them.
    load.ask("flush")
    load.close()
    mount.umount()


# --- fio ----------------------------------------------------------------------------------------


def _fio(file: Path, megabytes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "timeout", "-s", "KILL", "900"),
            *("fio", "--name=verify", f"--filename={file}", "--allow_file_create=0"),
            *("--ioengine=libaio", "--direct=1", "--invalidate=0", "--fallocate=none"),
            *("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", f"--size={megabytes}M"),
            *(
                "--iodepth=32",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--fsync=300",
            ),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _until_written(disk: Control, mark: int) -> None:
    disk.until(lambda status: status["totals"]["write"]["bytes"] >= mark, 120)


def _fio_through_kills(
    server: LossyServer, healfs_mount: Mounter, kills: int, size: int
) -> tuple[int, str, list[int]]:
    """fio's status, what it said, and how many answered writes the server lost in each kill."""
    server.kill()
    os.truncate(server.stable, size)
    server.start()
    mount = healfs_mount(server.uri())
    lost = []
    with control(mount) as disk:
        load = _fio(mount.file, size >> 20)
        for number in range(1, kills + 1):
            # All kills come in the first half, which writes; the second reads it all back.
            mark = size * number // (kills + 1)
            _until_written(disk, mark)
            server.kill()
            lost.append(len(server.dropped()))
            server.start()
        said, _ = load.communicate(timeout=900)
    return load.returncode, said, lost


def _most_lost_something(lost: list[int]) -> None:
    """A kill just after a flush of fio's or of the log's proves nothing."""
    assert sum(number > 0 for number in lost) >= len(lost) // 2, f"answered writes lost: {lost}"


def test_fio_verifies_through_ten_kills(server: LossyServer, healfs_mount: Mounter) -> None:
    status, said, lost = _fio_through_kills(server, healfs_mount, 10, 96 << 20)
    assert status == 0, said
    _most_lost_something(lost)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fio_verifies_through_a_hundred_kills(server: LossyServer, healfs_mount: Mounter) -> None:
    status, said, lost = _fio_through_kills(server, healfs_mount, 100, 512 << 20)
    assert status == 0, said
    _most_lost_something(lost)


def test_fio_finds_what_is_lost_without_a_replay(
    server: LossyServer, healfs_mount: Mounter, tmp_path: Path
) -> None:
    with broken(tmp_path, NO_REPLAY):
        status, said, lost = _fio_through_kills(server, healfs_mount, 3, 96 << 20)
    assert any(lost)
    assert status != 0 and "verify" in said, said
