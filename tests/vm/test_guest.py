"""healfs below a real Linux guest (promises 1, 3, 8 and 9 of healfs-semantics(7))."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vm.conftest import Boot
from tests.vm.guest import Bus, Guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

BUSES: tuple[Bus, ...] = ("virtio-blk", "virtio-scsi")
SIZE = 256 << 20


def sparse(path: Path) -> Path:
    path.touch()
    os.truncate(path, SIZE)
    return path


def work(guest: Guest) -> None:
    """A file system on the disk and the writer under way."""
    assert guest.ask("prepare", r"PREPARED .*", 120) == "PREPARED mkfs=0 mount=0"
    guest.send("write")
    guest.wait_line(r"FILE .*", 60, count=3)


def assert_nothing_noticed(guest: Guest) -> None:
    """The guest's own view at the end: no error, ext4 read-write, every synced byte there."""
    guest.ask("stop", "STOPPED", 60)
    guest.ask("report", "REPORTED", 30)
    assert guest.said(r"MOUNT .*") == ["MOUNT rw"]
    since = guest.mark()
    guest.ask("verify", "VERIFIED", 120)
    assert guest.said(r"(UMOUNTED|FSCK|REMOUNTED) .*", since) == [
        "UMOUNTED 0",
        "FSCK 0",
        "REMOUNTED 0",
    ]
    sums = dict(line.split()[1:] for line in guest.said(r"SUM \d+ [0-9a-f]{64}", since))
    assert sums == guest.sums()
    guest.ask("report", "REPORTED", 30)
    assert guest.said(r"KERNEL .*|(WRITE|READ)-ERROR .*") == []
    guest.power_off(60)


@pytest.mark.parametrize("bus", BUSES)
def test_guest_on_a_plain_file(boot: Boot, tmp_path: Path, bus: Bus) -> None:
    """The guest and its checks by themselves, without healfs."""
    guest = boot(sparse(tmp_path / "disk"), bus)
    work(guest)
    guest.ask("pause", "PAUSED", 30)
    guest.ask("flush", "FLUSHED 0", 30)
    assert guest.qmp("query-status")["status"] == "running"
    since = guest.mark()
    guest.send("resume")
    guest.wait_line(r"FILE .*", 60, since)
    guest.wait_line(r"BEAT .*", 30, since)
    assert_nothing_noticed(guest)
