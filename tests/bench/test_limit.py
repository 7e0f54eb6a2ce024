"""limit.c keeps what is written to it: a limit that cheats would be none."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import disks
from tests.bench.load import DISK_BYTES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="limit.c mounts by itself: it needs root")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not pytest's tmp_path: a socket's path must fit in 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="healfs-limit-") as name:
        yield Path(name)


def verified(file: Path, *options: str) -> None:
    """Written and read again."""
    done = subprocess.run(
        (
            *("fio", "--name=limit", f"--filename={file}", "--size=64m", "--direct=1"),
            *("--ioengine=libaio", "--allow_file_create=0"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", *options),
        ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", [disks.limit_file, disks.limit_nbd], ids=["file", "nbd"])
def test_what_is_written_is_read_again(kind: disks.Disk, directory: Path) -> None:
    with kind(directory) as file:
        assert file.stat().st_size == DISK_BYTES
        verified(file, "--rw=randrw", "--bsrange=4k-1m", "--iodepth=32", "--fsync=16")
        # More than there are slots: what there is no room for waits in the kernel.
        verified(file, "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=300")
        _ends(file)


def _ends(file: Path) -> None:
    """A read goes as far as the disk does."""
    fd = os.open(file, os.O_RDONLY)
    try:
        assert len(os.pread(fd, 8192, DISK_BYTES - 4096)) == 4096
        assert os.pread(fd, 4096, DISK_BYTES) == b""
    finally:
        os.close(fd)


def test_what_the_socket_has_no_room_for_waits(directory: Path) -> None:
    slow = ("--threads=1", "--filter=delay", "memory", "64m", "wdelay=10ms")
    with disks.nbdkit(directory, *slow), disks.limit(directory, directory / "nbd.sock") as file:
        verified(file, "--rw=write", "--bs=1m", "--iodepth=64")


def test_an_error_of_the_servers_is_the_callers(directory: Path) -> None:
    image = disks.backing_file(directory, 1 << 20)
    failing = ("--filter=error", "file", image, "error=ENOSPC", "error-pwrite-rate=100%")
    with (
        disks.nbdkit(directory, *failing),
        disks.limit(directory, directory / "nbd.sock") as file,
    ):
        fd = os.open(file, os.O_RDWR)
        try:
            with pytest.raises(OSError, match="No space left on device"):
                os.pwrite(fd, bytes(4096), 0)
            assert os.pread(fd, 4096, 4096) == disks.BLOCK
        finally:
            os.close(fd)
