"""An error for one range, and a store that answers nothing: the rest of the disk goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, nbdkit
from tests.conftest import Mounter
from tests.fuse.conftest import SIZE, HeldStore, Opener, Rules
from tests.fuse.control import ANSWER, control

BLOCK = b"x" * 4096
BAD = 1 << 20  # where the bad sector is
ERROR_ON_READ = f'[[rule]]\nkinds = ["READ"]\noffset = {BAD}\nlength = 512\nerrno = "%s"\n'

# nbdkit(1) calls these as shell scripts: $3 bytes at $4. The sector is bad until it is written.
_TOUCHES = f"[ $4 -lt {BAD + 512} ] && [ $(($4 + $3)) -gt {BAD} ]"
_PREAD = (
    f"if [ -e $BAD ] && {_TOUCHES}; then echo EIO medium error >&2; exit 1; fi; "
    "dd if=$IMAGE skip=$4 count=$3 iflag=skip_bytes,count_bytes,fullblock status=none"
)
_PWRITE = (
    "dd of=$IMAGE seek=$4 conv=notrunc oflag=seek_bytes status=none; "
    f"if {_TOUCHES}; then rm -f $BAD; fi"
)


@pytest.fixture
def bad_server(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[NbdServer, Path]]:
    """A server whose sector at BAD is bad while the marker exists, and the marker."""
    marker = tmp_path / "bad"
    marker.touch()
    monkeypatch.setenv("IMAGE", str(image))
    monkeypatch.setenv("BAD", str(marker))
    scripts = (f"get_size=echo {SIZE}", "can_write=exit 0", "can_flush=exit 0", "flush=exit 0")
    with nbdkit("eval", *scripts, f"pread={_PREAD}", f"pwrite={_PWRITE}") as server:
        yield server, marker


def test_a_bad_sector_of_a_server_stalls_neither_others_nor_its_repair(
    bad_server: tuple[NbdServer, Path], healfs_mount: Mounter, agent: Opener
) -> None:
    server, marker = bad_server
    mount = healfs_mount(server.uri(), "--slow-after", "1h")  # a shell for each request
    reader, other = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        reader.ask("pread", BAD, 512)
        assert disk.event("BLOCK_IO_ERROR")["data"]["operation"] == "read"
        disk.until(lambda status: status["totals"]["retries"] >= 3)
        assert other.ok("pread", 0, 4096) == bytes(4096)
        assert other.ok("pwrite", BAD + 4096, BLOCK) == 4096
        assert other.ok("pread", BAD + 4096, 4096) == BLOCK
        other.ok("fsync")
        status = disk.status()
        assert status["state"] == "ready" and status["outages"]["count"] == 0
        assert not reader.answered
        assert other.ok("pwrite", BAD, BLOCK) == 4096
        assert not marker.exists()
        assert reader.answer().value == BLOCK[:512]


def test_a_bad_sector_by_the_error_filter(
    image: Path, tmp_path: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """nbdkit's error filter fails every read while its file exists; writes go on."""
    marker = tmp_path / "failing"
    error = ("--filter=error", "error=EIO", "error-pread-rate=100%", f"error-pread-file={marker}")
    with nbdkit(error[0], "file", str(image), *error[1:]) as server:
        mount = healfs_mount(server.uri(), "--slow-after", "1h")
        marker.touch()
        reader, other = agent(mount.file), agent(mount.file)
        with control(mount) as disk:
            reader.ask("pread", BAD, 512)
            disk.until(lambda status: status["totals"]["retries"] >= 3)
            assert other.ok("pwrite", 0, BLOCK) == 4096
            other.ok("fsync")
            assert not reader.answered and disk.status()["state"] == "ready"
            # Policies act on a failed request as on a parked one.
            mount.policy("--rerror", "report")
            assert reader.answer(ANSWER).errno == errno.EIO
            marker.unlink()
            assert reader.ok("pread", 0, 4096) == BLOCK


@pytest.mark.parametrize("error", ["EIO", "ENODATA"])
def test_a_bad_sector_of_a_file(
    image: Path, tmp_path: Path, fault: Rules, healfs_mount: Mounter, agent: Opener, error: str
) -> None:
    fault(ERROR_ON_READ % error)
    mount = healfs_mount(image, "--fault", str(tmp_path / "faults.toml"))
    reader, other = agent(mount.file), agent(mount.file)
    with control(mount) as disk:
        reader.ask("pread", BAD - 512, 4096)
        disk.until(lambda status: status["totals"]["retries"] >= 3)
        assert other.ok("pread", 0, 4096) == bytes(4096)
        assert other.ok("pwrite", BAD, BLOCK) == 4096  # a parked read holds back nothing
        other.ok("fallocate", 3, BAD, 4096)
        assert disk.status()["state"] == "ready" and not reader.answered
        mount.policy("--rerror", "report")
        known = getattr(errno, error)
        assert reader.answer(ANSWER).errno == known
        mount.policy("--rerror", "retry")
        reader.ask("pread", BAD, 512)
        disk.parked(1)
        fault("")
        assert reader.answer().value == bytes(512)


def test_a_failed_write_holds_back_newer_ones_of_its_range_only(
    image: Path, tmp_path: Path, fault: Rules, healfs_mount: Mounter, agent: Opener
) -> None:
    fault(f'[[rule]]\nkinds = ["WRITE"]\noffset = {BAD}\nlength = 512\nerrno = "EIO"\n')
    mount = healfs_mount(image, "--fault", str(tmp_path / "faults.toml"))
    writers = [agent(mount.file) for _ in range(3)]
    with control(mount) as disk:
        writers[0].ask("pwrite", BAD, b"a" * 4096)
        disk.until(lambda status: status["totals"]["retries"] >= 2)
        writers[1].ask("pwrite", BAD + 512, b"b" * 512)
        disk.parked(2)
        assert writers[2].ok("pwrite", BAD + 4096, BLOCK) == 4096
        assert not writers[0].answered and not writers[1].answered
        fault("")
        assert writers[0].answer().value == 4096
        assert writers[1].answer().value == 512
    data = image.read_bytes()[BAD : BAD + 8192]
    assert data == b"a" * 512 + b"b" * 512 + b"a" * 3072 + BLOCK


def test_a_killed_process_of_a_failed_request_is_let_go(
    image: Path, tmp_path: Path, fault: Rules, healfs_mount: Mounter, agent: Opener
) -> None:
    """The disk is ready all the time, and the request was in flight before it waited."""
    fault(ERROR_ON_READ % "EIO")
    mount = healfs_mount(image, "--fault", str(tmp_path / "faults.toml"))
    reader = agent(mount.file)
    with control(mount) as disk:
        reader.ask("pread", BAD, 512)
        disk.until(lambda status: status["totals"]["retries"] >= 2)
        reader.kill()
        assert reader.ended() == -9
        disk.until(lambda status: status["requests"]["parked"] == 0)


def test_a_store_that_answers_nothing_leaves_the_rest_answering(
    held_store: HeldStore, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(held_store.path, "--slow-after", "1s")
    load = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "timeout", "-s", "KILL", "800"),
            *("fio", "--name=held", f"--filename={mount.file}", "--allow_file_create=0"),
            *("--ioengine=libaio", "--direct=1", "--invalidate=0", "--fallocate=none"),
            *("--rw=randrw", "--bs=4096", "--size=16M", "--iodepth=300", "--numjobs=3"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with control(mount) as disk:
        disk.until(lambda status: sum(status["requests"].values()) >= 900, 240)
        assert held_store.held()
        disk.state("stalled")
        stat = ("stat", "-c", "%s", mount.file)
        done = subprocess.run(stat, capture_output=True, text=True, timeout=ANSWER)
        assert done.stdout.strip() == str(64 << 20)
        assert mount.status(timeout=ANSWER)["outages"]["count"] == 1
        mount.policy("--werror", "report", timeout=ANSWER)
        mount.policy("--werror", "retry", timeout=ANSWER)
    before = time.monotonic()
    done = mount.umount(force=True)
    took = time.monotonic() - before
    assert "given up" in done.stderr and took < 30  # 5 s, on a machine of our own
    load.wait(120)
    assert load.returncode != 0
    assert not mount.processes() and not os.path.ismount(mount.mountpoint)


def test_a_store_that_answers_again_is_used_again(
    held_store: HeldStore, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(held_store.path, "--slow-after", "1s")
    writer = agent(mount.file)
    with control(mount) as disk:
        writer.ask("pwrite", 0, BLOCK)
        disk.state("stalled")
        held_store.release()
        assert writer.answer().value == 4096
        disk.state("ready")
        assert writer.ok("pread", 0, 4096) == BLOCK
