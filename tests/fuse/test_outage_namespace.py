"""An outage with a thousand requests parked in healfs: all but the data answers at once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, nbdkit
from tests.conftest import Mounter
from tests.fuse.conftest import Opener
from tests.fuse.control import ANSWER, Control, control
from tests.mounts import HealfsMount

SIZE = 256 << 20
MIB = 1 << 20


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Path, NbdServer]]:
    path = tmp_path / "large.img"
    with open(path, "xb") as file:
        file.truncate(SIZE)
    with nbdkit("file", str(path)) as server:
        yield path, server


class Load:
    """fio with its requests in the kernel at once: jobs of (direction, offset, block, depth)."""

    def __init__(self, file: Path, jobs: list[tuple[str, int, int, int]]) -> None:
        common = ["--ioengine=libaio", "--direct=1", "--invalidate=0", "--fallocate=none"]
        words = ["fio", *common, f"--filename={file}", "--allow_file_create=0"]
        for number, (direction, offset, block, depth) in enumerate(jobs):
            words += [
                *(f"--name=j{number}", f"--rw={direction}", f"--offset={offset}"),
                *(f"--bs={block}", f"--iodepth={depth}", f"--size={block * depth}"),
                *(f"--iodepth_batch_submit={depth}", f"--buffer_pattern={number + 1:#x}"),
            ]
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "timeout", "-s", "KILL", "800", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ended_well(self, seconds: float = 600) -> None:
        said, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, said
        assert "error" not in said.lower().replace("err= 0", ""), said


def _all_but_data_answers(mount: HealfsMount, *, chmod: bool) -> None:
    """Each in a process of its own, each within the deadline."""
    for command in (
        ("stat", mount.file),
        ("ls", "-l", mount.mountpoint),
        ("df", mount.mountpoint),
        *((("chmod", "640", mount.file), ("chown", "0:0", mount.file)) if chmod else ()),
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
        assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        ("stat", "-c", "%a %s", mount.file), capture_output=True, text=True, timeout=ANSWER
    )
    assert listed.stdout.split() == ["640", str(SIZE)]
    assert mount.status(timeout=ANSWER)["state"] == "stalled"
    assert "retry" in mount.policy(timeout=ANSWER)
    mount.policy("--retry-interval", "200ms", timeout=ANSWER)


def _small_jobs(processes: int, depth: int) -> list[tuple[str, int, int, int]]:
    directions = ["randwrite", "randread"]
    return [(directions[number % 2], number * 8 * MIB, 4096, depth) for number in range(processes)]


def _flush_last(disk: Control, mount: HealfsMount, agent: Opener, before: int) -> None:
    flusher = agent(mount.file)
    flusher.ask("fsync")
    disk.parked(before + 1)
    _all_but_data_answers(mount, chmod=False)  # chmod waits in the kernel, behind the FSYNC
    assert not flusher.answered


def test_a_thousand_parked_requests_and_a_flush(
    large: tuple[Path, NbdServer], healfs_mount: Mounter, agent: Opener
) -> None:
    _, server = large
    mount = healfs_mount(server.uri())
    with control(mount) as disk:
        server.kill()
        disk.state("stalled")
        load = Load(mount.file, _small_jobs(6, 200))
        parked = disk.parked(1200, 240)["requests"]["parked"]
        assert parked >= 1000
        _all_but_data_answers(mount, chmod=True)
        _flush_last(disk, mount, agent, parked)
        assert disk.status()["requests"]["parked"] == 1201
        server.start()
        load.ended_well()
        status = disk.until(lambda s: s["requests"] == dict.fromkeys(s["requests"], 0))
    totals = status["totals"]
    assert [totals[kind]["requests"] for kind in ("read", "write", "flush")] == [600, 600, 1]
    assert not any(totals[kind]["errors"] for kind in ("read", "write", "flush"))


def test_more_parked_than_the_ring_holds(
    large: tuple[Path, NbdServer], healfs_mount: Mounter, agent: Opener
) -> None:
    """Payloads beyond the ring go to ordinary memory, and /dev/fuse is still read."""
    image, server = large
    mount = healfs_mount(server.uri())
    jobs = [("write", number * 32 * MIB, MIB, 32) for number in range(3)]
    with control(mount) as disk:
        server.kill()
        disk.state("stalled")
        load = Load(mount.file, [*jobs, ("randwrite", 192 * MIB, 4096, 256)])
        status = disk.parked(3 * 32 + 256, 240)
        limits = status["limits"]
        ring, overflow = limits["payload_bytes"], limits["payload_overflow_bytes"]
        assert overflow["used"] > 0 and ring["used"] + overflow["used"] > 96 * MIB
        assert ring["used"] <= ring["limit"] and overflow["used"] <= overflow["limit"]
        _all_but_data_answers(mount, chmod=True)
        _flush_last(disk, mount, agent, status["requests"]["parked"])
        server.start()
        load.ended_well()
        agent(mount.file).ok("fsync")  # until then the write log holds what it may have to repeat
        limits = disk.until(lambda s: s["requests"]["parked"] == 0)["limits"]
    assert limits["payload_bytes"]["used"] == limits["payload_overflow_bytes"]["used"] == 0
    with open(image, "rb") as file:
        for number in range(3):
            file.seek(number * 32 * MIB)
            assert file.read(32 * MIB) == bytes([number + 1]) * (32 * MIB)
        file.seek(192 * MIB)
        assert file.read(MIB) == b"\4" * MIB


def test_a_server_that_is_stopped_leaves_the_rest_answering(
    large: tuple[Path, NbdServer], healfs_mount: Mounter, agent: Opener
) -> None:
    """SIGSTOP: the connection lives, no answer comes, most requests are parked."""
    _, server = large
    mount = healfs_mount(server.uri(), "--slow-after", "1s")
    with control(mount) as disk:
        server.pause()
        load = Load(mount.file, _small_jobs(4, 250))
        disk.until(lambda s: sum(s["requests"].values()) >= 1000, 240)
        status = disk.state("stalled")
        assert status["requests"]["in_flight"] and status["requests"]["parked"]
        _all_but_data_answers(mount, chmod=True)
        server.resume()
        load.ended_well()
        disk.state("ready")


@pytest.mark.soak
def test_again_and_again(
    large: tuple[Path, NbdServer], healfs_mount: Mounter, agent: Opener
) -> None:
    _, server = large
    mount = healfs_mount(server.uri())
    os.sync()
    with control(mount) as disk:
        for _ in range(10):
            server.kill()
            disk.state("stalled")
            load = Load(mount.file, _small_jobs(16, 250))
            parked = disk.parked(4000, 120)["requests"]["parked"]
            _all_but_data_answers(mount, chmod=True)
            _flush_last(disk, mount, agent, parked)
            server.start()
            load.ended_well()
            disk.until(lambda s: s["requests"] == dict.fromkeys(s["requests"], 0))
