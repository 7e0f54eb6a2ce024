"""A disk that nobody uses: nothing wakes its processes, and who comes is served all the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.backends.nbd_servers import wait_until
from tests.conftest import Mounter
from tests.fuse.conftest import Opener
from tests.mounts import HealfsMount

QUIET = 3.0  # seconds: three beats
GENEROUS = 240.0


def _woken(pids: list[int]) -> int:
    """How often these processes have slept."""
    count = 0
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            count += int(fields["voluntary_ctxt_switches"])
    return count


def _until_idle(mounts: list[HealfsMount]) -> None:
    """Nothing wakes any process of theirs for QUIET seconds."""
    pids = [pid for mount in mounts for pid in mount.status()["pids"].values()]
    seen, since = _woken(pids), time.monotonic()

    def idle() -> bool:
        nonlocal seen, since
        if (now := _woken(pids)) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > QUIET

    wait_until(idle, "quiet", GENEROUS)


def test_who_comes_to_a_worker_that_hangs_is_served_by_another(
    healfs_mount: Mounter, agent: Opener, tmp_path: Path
) -> None:
    """It hangs while the disk is idle, so nobody misses it. Then a request comes to one disk, and
    an operator to the other."""
    used, asked = disks = [_mount(healfs_mount, tmp_path / name) for name in ("used", "asked")]
    reader = agent(used.file)
    assert reader.do("pread", 0, 4096).value == bytes(4096)
    workers = [disk.status()["pids"]["worker"] for disk in disks]
    _until_idle(disks)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    reader.ask("pread", 4096, 4096)
    assert asked.run("status", str(asked.mountpoint), check=False).returncode == 1
    assert reader.answer(GENEROUS).value == bytes(4096)
    for disk, worker in zip(disks, workers, strict=True):
        wait_until(lambda disk=disk: _answers(disk), "another worker", GENEROUS)  # type: ignore[misc]
        assert disk.status()["pids"]["worker"] != worker


def _mount(healfs_mount: Mounter, image: Path) -> HealfsMount:
    image.touch()
    os.truncate(image, 1 << 20)
    return healfs_mount(image)


def _answers(mount: HealfsMount) -> bool:
    return mount.run("status", str(mount.mountpoint), check=False).returncode == 0
