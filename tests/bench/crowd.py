"""Many requests at once: what each costs the worker, and how they are let go after an outage."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import disks
from tests.bench.load import DISK_BYTES, Load
from tests.bench.recovery import Server
from tests.fuse.control import Control, control
from tests.mounts import HealfsMount, connections

CROWDS = (0, 1_000, 16_000)
ROOM = ("--log-entries", "40000", "--log-size", "256M")  # 16,000 are less than half of it
READS = 100_000
ROUNDS = 3
DEADLINE = 300.0  # seconds
QUIET = 0.1, 0.001  # seconds, and of these the worker's CPU: it has nothing to do
IDLE_MOUNTS = 64
IDLE_SECONDS = 20.0
CPUCLOCK_SCHED = 2  # of another process's clock: clock_getcpuclockid(3)


@dataclass(frozen=True)
class Release:
    """Requests a second; seconds."""

    released: float
    healthy: float
    longest_away: float  # the longest that a question to the event loop was not answered


def cpu_seconds(pid: int) -> float:
    """That a process has used, of all its threads, also of those that have ended."""
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


@contextlib.contextmanager
def _fio(file: Path, pattern: str, count: int, depth: int) -> Iterator[subprocess.Popen[bytes]]:
    with disks.process(
        *("fio", "--name=crowd", f"--filename={file}", f"--size={DISK_BYTES}", "--direct=1"),
        *(f"--rw={pattern}", "--bs=4k", "--ioengine=libaio", f"--iodepth={depth}"),
        *(f"--number_ios={count}", "--norandommap", "--invalidate=0", "--allow_file_create=0"),
        *("--io_size=1t", "--output=/dev/null"),
    ) as running:
        yield running


def _run(file: Path, pattern: str, count: int, depth: int = 32) -> None:
    with _fio(file, pattern, count, depth) as running:
        _end(running)


def _end(fio: subprocess.Popen[bytes]) -> None:
    if status := fio.wait(DEADLINE):
        raise RuntimeError(f"fio: exit status {status}")


def with_log_entries(directory: Path) -> dict[int, float]:
    """CPU seconds of a read, by entries in the log."""
    found: dict[int, list[float]] = {count: [] for count in CROWDS}
    with disks.healfs_mount(disks.backing_file(directory), "", None, *ROOM) as mount:
        worker = mount.status()["pids"]["worker"]
        _run(mount.file, "randread", READS)  # the first ones pay for what is not there yet
        for _ in range(ROUNDS):
            _flush(mount.file)
            for count in CROWDS:
                have = mount.status()["write_log"]["requests"]
                if count > have:
                    _run(mount.file, "randwrite", count - have)
                have = mount.status()["write_log"]["requests"]
                if have != count:
                    raise RuntimeError(f"{have} entries in the log, and not {count}")
                before = cpu_seconds(worker)
                _run(mount.file, "randread", READS)
                found[count].append((cpu_seconds(worker) - before) / READS)
    return _medians(found)


def with_parked(directory: Path) -> dict[int, float]:
    """CPU seconds of a write that is parked and released, by how many are; those of an outage
    with a single one are not among them."""
    found: dict[int, list[float]] = {count: [] for count in CROWDS[1:]}
    with _disk(directory) as (server, mount, disk):
        _outage(server, mount, disk, CROWDS[-1])  # pays for what is not there yet
        for _ in range(ROUNDS):
            alone = _outage(server, mount, disk, 1)
            for count, each in found.items():
                each.append((_outage(server, mount, disk, count) - alone) / (count - 1))
    return _medians(found)


def _medians(found: dict[int, list[float]]) -> dict[int, float]:
    return {count: statistics.median(each) for count, each in found.items()}


def _outage(server: Server, mount: HealfsMount, disk: Control, count: int) -> float:
    """CPU seconds of the worker, for `count` writes. No question is asked meanwhile: an answer
    counts all that are parked."""
    waiting = connections() / str(os.minor(mount.file.stat().st_dev)) / "waiting"
    worker = mount.status()["pids"]["worker"]
    _flush(mount.file)  # else what was written before is written once more
    server.kill()
    disk.state("stalled")
    before = cpu_seconds(worker)
    with _fio(mount.file, "randwrite", count, count) as running:
        until = time.monotonic() + DEADLINE
        while int(waiting.read_text()) < count or not _quiet(worker):
            if time.monotonic() > until:
                raise TimeoutError(f"{count} writes are not parked after {DEADLINE:g} s")
            time.sleep(0.01)
        spent = cpu_seconds(worker) - before
        disk.parked(count)
        before = cpu_seconds(worker)
        server.start()
        _end(running)
    return spent + cpu_seconds(worker) - before


def _quiet(worker: int) -> bool:
    seconds, most = QUIET
    before = cpu_seconds(worker)
    time.sleep(seconds)
    return cpu_seconds(worker) - before < most


def release(directory: Path, count: int = 10_000) -> Release:
    with _disk(directory) as (server, mount, disk):
        found = [_release(server, mount, disk, count) for _ in range(ROUNDS)]
    return Release(
        statistics.median(one.released for one in found),
        statistics.median(one.healthy for one in found),
        max(one.longest_away for one in found),
    )


def _release(server: Server, mount: HealfsMount, disk: Control, count: int) -> Release:
    healthy = Load("randwrite", "4k", 512).run(mount.file, 2.0)
    _flush(mount.file)  # else all of that is written once more before the first parked one
    server.kill()
    disk.state("stalled")
    with _fio(mount.file, "randwrite", count, count) as running:
        disk.parked(count)
        listened = server.start()
        longest, left = 0.0, count
        while left:
            asked = time.monotonic()
            left = disk.status()["requests"]["parked"]
            longest = max(longest, time.monotonic() - asked)
            time.sleep(0.01)  # each answer counts all that are parked
        seconds = time.monotonic() - listened
        _end(running)
    return Release(count / seconds, healthy, longest)


def _flush(file: Path) -> None:
    fd = os.open(file, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _disk(directory: Path) -> Iterator[tuple[Server, HealfsMount, Control]]:
    server = Server(directory, DISK_BYTES)
    server.start()
    try:
        with disks.healfs_mount(server.uri, "", None, *ROOM) as mount, control(mount) as disk:
            yield server, mount, disk
            server.kill()
            mount.umount(force=True, check=False)
    finally:
        server.kill()


def idle(directory: Path) -> float:
    """Of one core, that IDLE_MOUNTS mounts take together."""
    with contextlib.ExitStack() as stack:
        pids = []
        for number in range(IDLE_MOUNTS):
            image = directory / f"{number}.img"
            image.write_bytes(bytes(1 << 20))
            mount = stack.enter_context(disks.healfs_mount(image, "", None))
            pids += mount.status()["pids"].values()
        time.sleep(2.0)  # what is left to do after the mount
        before = sum(map(cpu_seconds, pids))
        time.sleep(IDLE_SECONDS)
        return (sum(map(cpu_seconds, pids)) - before) / IDLE_SECONDS
