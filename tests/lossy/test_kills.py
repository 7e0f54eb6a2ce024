"""kill -9 of a server that loses what it has not flushed: nothing that was answered is lost.

Each kill is asserted to have lost answered writes, else the test would prove nothing; and with
the replay broken on purpose the same checker finds lost blocks.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import Mounter
from tests.fuse.control import control
from tests.lossy.conftest import SIZE, Check
from tests.lossy.rig import NO_REPLAY, Checker, LossyServer, broken

BLOCKS = 1024
SETTLE = 2.0  # seconds
WRITES = 150  # between two kills


def _kill(server: LossyServer, load: Checker, hold: int) -> int:
    """In full flight, with `hold` writes taken that will land later; returns what was lost."""
    load.until("writes", load.ask("progress")["writes"] + WRITES)
    if hold:
        server.set(hold=hold)
        server.until("held", hold)
    # Not at the very end of the settle time: what the kernel does not run cannot look at a clock.
    server.late_until(time.monotonic() + SETTLE * 0.7)
    server.kill()
    return len(server.dropped())


def _through_kills(server: LossyServer, healfs_mount: Mounter, checker: Check, kills: int) -> None:
    server.late_delay = 0.05
    mount = healfs_mount(server.uri(), "--settle", f"{SETTLE:g}s")
    load = checker(mount.file, blocks=BLOCKS)
    for number in range(kills):
        assert _kill(server, load, number % 3) > 0, "the server lost nothing"
        # Promise 2, where it counts: on what is left of the server.
        assert load.ask("stable", str(server.stable)) == {"lost": []}
        server.start()
        if number % 3 == 2:
            assert load.ask("check") == {"lost": [], "errors": []}  # promise 3
    assert load.ask("flush") == {"lost": [], "errors": []}
    assert load.ask("stop") == {"errors": []}
    progress = load.ask("progress")
    assert progress["flushes"] > kills and progress["synchronous"] > 0
    assert server.landed_late(), "no write landed late"
    status = mount.status()
    assert status["outages"]["count"] == kills
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
    lost = _kill(server, load, 0)
    server.start()
    found = load.ask("check")["lost"]
    assert found, f"it has not seen that {lost} writes are gone"
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
            *("--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--fsync=300"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _fio_through_kills(
    server: LossyServer, healfs_mount: Mounter, kills: int
) -> tuple[int, str, int]:
    """fio's status, what it said, and how many answered writes the server lost."""
    mount = healfs_mount(server.uri())
    size = server.stable.stat().st_size
    lost = 0
    with control(mount) as disk:
        load = _fio(mount.file, size >> 20)
        for number in range(1, kills + 1):
            # All kills come in the first half, which writes; the second reads it all back.
            mark = size * number // (kills + 1)
            disk.until(lambda s, mark=mark: s["totals"]["write"]["bytes"] >= mark, 120)
            server.kill()
            lost += len(server.dropped())
            server.start()
        said, _ = load.communicate(timeout=900)
    return load.returncode, said, lost


def test_fio_verifies_through_kills(server: LossyServer, healfs_mount: Mounter) -> None:
    status, said, lost = _fio_through_kills(server, healfs_mount, 3)
    assert status == 0, said
    assert lost > 0, "the server lost nothing"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fio_verifies_through_a_hundred_kills(server: LossyServer, healfs_mount: Mounter) -> None:
    server.kill()
    with open(server.stable, "r+b") as file:
        file.truncate(SIZE * 32)
    server.start()
    status, said, lost = _fio_through_kills(server, healfs_mount, 100)
    assert status == 0, said
    assert lost > 100


def test_fio_finds_what_is_lost_without_a_replay(
    server: LossyServer, healfs_mount: Mounter, tmp_path: Path
) -> None:
    with broken(tmp_path, NO_REPLAY):
        status, said, lost = _fio_through_kills(server, healfs_mount, 1)
    assert lost > 0
    assert status != 0 and "verify" in said, said
