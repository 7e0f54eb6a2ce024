"""healfs doctor beside a real mount, and a real QEMU that has its file open."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import Mounter
from tests.mounts import HealfsMount

DEADLINE = 60


@contextlib.contextmanager
def qemu(*arguments: str) -> Iterator[None]:
    """A paused machine, from the moment on at which it answers."""
    command = ("qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-name", "vm1")
    with subprocess.Popen(
        ("timeout", str(DEADLINE), *command, "-accel", "tcg", "-qmp", "stdio", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        try:
            assert b"QMP" in process.stdout.readline()  # the disks are open
            yield
        finally:
            process.terminate()  # timeout(1) passes it on


def doctor(mount: HealfsMount) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    done = mount.run("doctor", "--json", str(mount.mountpoint), check=False)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout):
        found.setdefault(finding["check"].split(" (pid")[0], []).append(finding)
    return done.returncode, found


def test_the_way_a_guest_uses_the_disk(tmp_path: Path, healfs_mount: Mounter) -> None:
    mount = healfs_mount(tmp_path / "disk", "--create", "64M")
    _, found = doctor(mount)
    assert found["state"][0]["level"] == found["backend"][0]["level"] == "ok"
    assert "guest vm1" not in found
    file = str(mount.file)
    with qemu("-drive", f"file={file},format=raw,if=virtio,cache=none,aio=native"):
        status, found = doctor(mount)
        assert status == 1
        assert "aio=native" in found["guest vm1"][0]["text"]
        assert found["guest vm1"][0]["level"] == "error"
    blockdev = {"driver": "file", "filename": file, "node-name": "d", "aio": "threads"}
    with qemu(
        *("-blockdev", json.dumps(blockdev), "-device", "virtio-scsi-pci"),
        *("-device", "scsi-hd,drive=d"),
    ):
        _, found = doctor(mount)
        assert [f["level"] for f in found["guest vm1"]] == ["ok"]
        assert "scsi-hd" in found["guest vm1"][0]["text"]
    # For people: every line fits a terminal, and what mends it stands below.
    text = mount.run("doctor", str(mount.mountpoint), check=False).stdout
    assert all(len(line) <= 80 for line in text.splitlines()) and "FINDING" in text
