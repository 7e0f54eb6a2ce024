"""What the doctor finds in a host, in the command lines of QEMU, and in a status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from healfs.doctor import disk, guests, host
from healfs.doctor.finding import Finding, Level

FILE, MOUNTPOINT = "/srv/vm1/disk.img", "/srv/vm1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host on which all is well."""
    for path, text in (
        ("dev/fuse", ""),
        ("etc/fuse.conf", "# users\nuser_allow_other\n"),
        ("proc/self/mountinfo", "30 20 0:27 / /sys/fs/fuse/connections rw - fusectl none rw\n"),
        ("proc/sys/fs/fuse/default_request_timeout", "0\n"),
        ("proc/sys/fs/fuse/max_request_timeout", "0\n"),
        ("proc/sys/fs/fuse/max_pages_limit", "256\n"),
        ("proc/sys/kernel/hung_task_timeout_secs", "0\n"),
        ("proc/sys/kernel/io_uring_disabled", "0\n"),
        ("sys/module/fuse/parameters/max_user_bgreq", "65535\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "sys/fs/fuse/connections").mkdir(parents=True)
    return tmp_path


def look(root: Path, release: str = "6.9.0", uid: int = 1000, **more: Any) -> dict[str, Finding]:
    given = host.Host(root, release, uid, **{"memlock": -1, "which": lambda name: name, **more})
    return {finding.check: finding for finding in host.examine(given)}


def test_a_host_on_which_all_is_well(root: Path) -> None:
    assert {finding.level for finding in look(root).values()} == {Level.OK}


@pytest.mark.parametrize(
    ("path", "text", "check", "level", "mend"),
    [
        ("proc/sys/fs/fuse/default_request_timeout", "30", "", Level.ERROR, "sysctl -w fs.fuse.de"),
        ("proc/sys/fs/fuse/max_request_timeout", "60", "", Level.ERROR, "sysctl -w fs.fuse.max_r"),
        ("proc/sys/fs/fuse/max_pages_limit", "32", "", Level.NOTE, "max_pages_limit=256"),
        ("etc/fuse.conf", "#user_allow_other", "/etc/fuse.conf", Level.NOTE, "user_allow_other"),
        ("sys/module/fuse/parameters/max_user_bgreq", "127", "", Level.WARNING, "echo 65535 >"),
        ("proc/sys/kernel/hung_task_timeout_secs", "120", "", Level.NOTE, ""),
        ("proc/sys/kernel/io_uring_disabled", "1", "", Level.NOTE, "io_uring_disabled=0"),
        ("proc/self/mountinfo", "", "fusectl", Level.WARNING, "mount -t fusectl"),
    ],
)
def test_each_setting(
    root: Path, path: str, text: str, check: str, level: Level, mend: str
) -> None:
    (root / path).write_text(text)
    (bad,) = (finding for finding in look(root).values() if finding.level is not Level.OK)
    assert check or bad.check.endswith(Path(path).name)
    assert bad.level is level and mend in bad.mend and bool(mend) == bool(bad.mend)


def test_what_no_file_tells(root: Path) -> None:
    assert look(root, "6.1.0-42-amd64")["kernel"].level is Level.ERROR
    assert look(root, "10.0")["kernel"].level is Level.OK
    assert look(root, memlock=8 << 20)["memlock"].level is Level.WARNING
    assert "apt install fuse3" in look(root, which=lambda name: None)["fusermount3"].mend
    (root / "dev/fuse").unlink()
    assert look(root)["/dev/fuse"].mend == "modprobe fuse"


def test_a_host_that_panics(root: Path) -> None:
    (root / "proc/sys/kernel/hung_task_timeout_secs").write_text("120\n")
    (root / "proc/sys/kernel/hung_task_panic").write_text("1\n")
    assert look(root)["kernel.hung_task_panic"].level is Level.ERROR


def test_root_needs_no_leave_of_users(root: Path) -> None:
    (root / "etc/fuse.conf").unlink()
    (root / "sys/module/fuse/parameters/max_user_bgreq").write_text("12")
    found = look(root, uid=0, memlock=0, which=lambda name: None)
    assert {finding.level for finding in found.values()} == {Level.OK}


# --- guests -----------------------------------------------------------------------------------


def process(proc: Path, *command: str, opened: str = FILE, pid: int = 7) -> None:
    (proc / f"{pid}/fd").mkdir(parents=True)
    (proc / f"{pid}/cmdline").write_bytes("\0".join([*command, ""]).encode())
    (proc / f"{pid}/fd/9").symlink_to(opened)


def one(proc: Path, *command: str, program: str = "/usr/bin/qemu-system-x86_64") -> list[Finding]:
    process(proc, program, *command)
    return guests.examine(FILE, MOUNTPOINT, proc)


def blockdev(**keys: Any) -> str:
    return json.dumps(keys)


def test_a_drive_with_threads_is_well(tmp_path: Path) -> None:
    (finding,) = one(tmp_path, "-name", "vm1", "-drive", f"file={FILE},if=virtio,format=raw")
    assert finding.level is Level.OK and finding.check == "guest vm1 (pid 7)"


@pytest.mark.parametrize("aio", ["native", "io_uring"])
def test_what_freezes_the_whole_qemu(tmp_path: Path, aio: str) -> None:
    (finding,) = one(tmp_path, "-drive", f"file={FILE},if=virtio,aio={aio},cache=none")
    assert finding.level is Level.ERROR and f"aio={aio}" in finding.text
    assert f"healfs attach {MOUNTPOINT}" in finding.mend


def test_libvirts_nodes_are_followed_to_the_device(tmp_path: Path) -> None:
    """As libvirt 9 writes them: a storage node, a format node on it, and a device on that."""
    storage = blockdev(driver="file", filename=FILE, aio="native", **{"node-name": "storage"})
    image = blockdev(driver="raw", file="storage", **{"node-name": "format"})
    device = blockdev(driver="ide-hd", bus="ahci.0", drive="format", id="sata0")
    found = one(
        tmp_path,
        *("-name", "guest=web,debug-threads=on", "-blockdev", storage, "-blockdev", image),
        *("-device", device, "-device", "virtio-net-pci,netdev=n"),
    )
    assert [f.level for f in found] == [Level.ERROR, Level.WARNING]
    assert found[0].check == "guest web (pid 7)" and "IDE or SATA" in found[1].text


@pytest.mark.parametrize(
    "arguments",
    [
        ("-drive", f"file={FILE},if=virtio,cache=unsafe"),
        ("-blockdev", f"driver=file,filename={FILE},node-name=d,cache.no-flush=on"),
        (
            "-blockdev",
            blockdev(
                driver="raw",
                file={"driver": "file", "filename": FILE},
                cache={"no-flush": True},
                **{"node-name": "d"},
            ),
        ),
    ],
)
def test_flushes_that_are_thrown_away(tmp_path: Path, arguments: tuple[str, str]) -> None:
    (finding,) = one(tmp_path, *arguments)
    assert finding.level is Level.ERROR and "flushes are thrown away" in finding.text


def test_a_drive_without_an_interface_is_ide(tmp_path: Path) -> None:
    (finding,) = one(tmp_path, "-drive", f"file={FILE}")
    assert finding.level is Level.WARNING and "IDE" in finding.text


def test_a_comma_in_a_name(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    process(
        tmp_path / "proc",
        *("qemu-system-x86_64", "-drive", "file=/srv/a,,b/disk.img,if=virtio,aio=native"),
        opened="/srv/a,b/disk.img",
    )
    (finding,) = guests.examine("/srv/a,b/disk.img", "/srv/a,b", tmp_path / "proc")
    assert finding.level is Level.ERROR


def test_who_is_no_guest_of_this_disk(tmp_path: Path) -> None:
    process(tmp_path, "qemu-system-x86_64", "-drive", "file=/other", opened="/other", pid=1)
    process(tmp_path, "dd", f"of={FILE}", pid=2)
    (tmp_path / "3/fd").mkdir(parents=True)  # gone meanwhile: no cmdline
    (tmp_path / "self").mkdir()
    assert guests.examine(FILE, MOUNTPOINT, tmp_path) == []


# --- the disk ---------------------------------------------------------------------------------


def status(**changed: Any) -> dict[str, Any]:
    abilities = dict.fromkeys(
        ("flush", "fua", "discard", "write_zeroes", "volatile_cache", "multi_conn"), True
    )
    policy = {"read": {"rerror": "retry"}, "write": {"werror": "retry"}}
    whole = {"mountpoint": MOUNTPOINT, "state": "ready", "source": "nbd://nas/", "policy": policy}
    return {**whole, "backend": {**abilities, **changed.pop("backend", {})}, **changed}


def test_a_disk_with_which_all_is_well() -> None:
    assert {finding.level for finding in disk.examine(status())} == {Level.OK}


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({"state": "stalled", "reason": "refused"}, Level.WARNING, "stalled: refused"),
        ({"backend": {"flush": False}}, Level.ERROR, "cannot flush"),
        ({"backend": {"write_zeroes": False}}, Level.NOTE, "zeroes are written as data"),
        ({"backend": {"multi_conn": False}}, Level.NOTE, "one connection"),
        ({"notes": ["the keeper is gone"]}, Level.WARNING, "the keeper is gone"),
        ({"policy": {"write": {"werror": "report"}}}, Level.NOTE, "not waited out"),
    ],
)
def test_each_thing_a_disk_lacks(changed: dict[str, Any], level: Level, words: str) -> None:
    (bad,) = (f for f in disk.examine(status(**changed)) if f.level is not Level.OK)
    assert bad.level is level and words in bad.text


def test_a_disk_that_nobody_knows_yet() -> None:
    found = disk.examine({**status(), "backend": None})
    assert Level.NOTE in {finding.level for finding in found}
    assert disk.examine({})  # an older daemon's: no traceback
