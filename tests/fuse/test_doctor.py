"""healfs doctor beside a real mount, and a real QEMU that has its file open."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Mounter
from tests.fuse.commands import Commands
from tests.mounts import HealfsMount

DEADLINE = 240


@contextlib.contextmanager
def qemu(*arguments: str, descriptors: tuple[int, ...] = ()) -> Iterator[None]:
    """A paused machine, from the moment on at which it answers."""
    command = ("qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-name", "vm1")
    with subprocess.Popen(
        ("timeout", str(DEADLINE), *command, "-accel", "tcg", "-qmp", "stdio", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=descriptors,
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


PASSED = ("-blockdev", "driver=file,filename=/dev/fdset/2,node-name=d", "-device")
BAD = [
    (("-drive", "file={file},format=raw,if=virtio,cache.no-flush=on"), "flushes are thrown away"),
    (("-hda", "{file}"), "IDE"),
    (("{file}",), "IDE"),
    (
        (
            *("-drive", "file={file},format=raw,if=none,id=d", "-device", "lsi53c895a"),
            *("-device", "scsi-hd,drive=d"),
        ),
        "lsi53c895a, scsi-hd (SCSI)",
    ),
    (("-add-fd", "fd={fd},set=2", *PASSED, "virtio-blk-pci,drive=d"), "aio=threads"),
    (("-add-fd", "fd={fd},set=2", *PASSED, "nvme,serial=1,drive=d"), "NVMe"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=str)
def test_what_a_real_qemu_takes(
    tmp_path: Path, healfs_mount: Mounter, arguments: tuple[str, ...], words: str
) -> None:
    mount = healfs_mount(tmp_path / "disk", "--create", "64M")
    with mount.file.open("r+b") as file:
        places = {"file": str(mount.file), "fd": file.fileno()}
        given = [argument.format(**places) for argument in arguments]
        with qemu(*given, descriptors=(file.fileno(),)):
            _, found = doctor(mount)
    assert words in found["guest vm1"][0]["text"]


@pytest.mark.parametrize("of_a_mount", [False, True])
def test_text_and_json_say_the_same(
    tmp_path: Path, commands: Commands, image: Path, of_a_mount: bool
) -> None:
    where = []
    if of_a_mount:
        commands.run("mount", image, commands.mountpoint)
        commands.run("pause", commands.mountpoint)
        where = [commands.mountpoint]
    listed = commands.run("doctor", "--json", *where)
    shown = commands.run("doctor", *where)
    found = json.loads(listed.stdout)
    assert "kernel" in {finding["check"] for finding in found}
    assert ("state" in {finding["check"] for finding in found}) is of_a_mount
    assert listed.returncode == shown.returncode == any(f["level"] == "error" for f in found)
    assert "\x1b" not in shown.stdout
    lines = shown.stdout.splitlines()
    for finding in found:
        # A line of its own, whole, for whoever pastes it.
        assert bool(finding["mend"]) is (finding["level"] != "ok")
        assert finding["mend"] in ["", *lines]
    table = shown.stdout.partition("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 80
    if of_a_mount:
        assert f"healfs resume {commands.mountpoint}" in lines
