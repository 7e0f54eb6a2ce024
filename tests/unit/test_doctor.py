"""What the doctor finds in a host, in the command lines of QEMU, and in a status."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import healfs
from healfs.config import MountConfig
from healfs.core.states import State
from healfs.core.writelog import memory_size
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
        ("bin/fusermount3", ""),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bin/fusermount3").chmod(0o4755)
    (tmp_path / "sys/fs/fuse/connections").mkdir(parents=True)
    return tmp_path


def look(root: Path, release: str = "6.9.0", uid: int = 1000, **more: Any) -> dict[str, Finding]:
    there = {"memlock": -1, "which": lambda name: f"/bin/{name}"}
    found = host.examine(host.Host(root, release, uid, **{**there, "plain": "", **more}))
    assert all_can_be_mended(found, "sudo " if uid else "")
    return {finding.check: finding for finding in found}


def all_can_be_mended(found: list[Finding], root: str = "") -> bool:
    """A line for a shell: a known command with its arguments, or a comment. None for what is ok."""
    commands = rf"{root}(sysctl|modprobe|chmod|apt-get|mount|grep) "
    known = rf"# |healfs [a-z]+|{commands}|echo \S.* \| {root}tee "
    return all(
        bool(re.match(f"{known}|ulimit ", f.mend)) is (f.level is not Level.OK)
        and subprocess.run(["sh", "-n", "-c", f.mend]).returncode == 0
        for f in found
    )


def test_a_host_on_which_all_is_well(root: Path) -> None:
    assert {finding.level for finding in look(root).values()} == {Level.OK}


@pytest.mark.parametrize(
    ("path", "text", "check", "level", "mend"),
    [
        ("proc/sys/fs/fuse/default_request_timeout", "30", "", Level.ERROR, "fs.fuse.default_r"),
        ("proc/sys/fs/fuse/max_request_timeout", "60", "", Level.ERROR, "sysctl -w fs.fuse.max_r"),
        ("proc/sys/fs/fuse/max_pages_limit", "32", "", Level.NOTE, "max_pages_limit=256"),
        ("etc/fuse.conf", "#user_allow_other", "/etc/fuse.conf", Level.NOTE, "tee -a /etc/fuse"),
        ("sys/module/fuse/parameters/max_user_bgreq", "127", "", Level.WARNING, "echo 65535 |"),
        ("proc/sys/kernel/hung_task_timeout_secs", "120", "", Level.NOTE, "timeout_secs=0"),
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
    assert bad.level is level and mend in bad.mend


def test_what_no_file_tells(root: Path) -> None:
    assert look(root, "6.1.0-42-amd64")["kernel"].level is Level.ERROR
    assert look(root, "10.0")["kernel"].level is Level.OK
    assert look(root, memlock=8 << 20)["memlock"].level is Level.WARNING
    # What healfs asks for: the payloads, and the table of their requests.
    default = {option.name: option.default for option in dataclasses.fields(MountConfig)}
    enough = memory_size(default["log_size"], default["log_entries"])
    assert look(root, memlock=enough).keys() == look(root, memlock=None).keys()
    assert look(root, memlock=enough - 1)["memlock"].level is Level.WARNING
    assert "apt-get install fuse3" in look(root, which=lambda name: None)["fusermount3"].mend
    (root / "bin/fusermount3").chmod(0o755)
    assert look(root)["fusermount3"].mend == "sudo chmod u+s /bin/fusermount3"
    (root / "dev/fuse").unlink()
    assert look(root)["/dev/fuse"].mend == "sudo modprobe fuse"
    assert look(root, uid=0)["/dev/fuse"].mend == "modprobe fuse"


def test_a_comment_behind_an_option_of_fuse_conf(root: Path) -> None:
    (root / "etc/fuse.conf").write_text("user_allow_other # for libvirt\n")
    assert "/etc/fuse.conf" not in look(root)


def test_a_fuse_conf_that_only_root_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "fuse.conf")
    monkeypatch.setattr(host.Host, "text", lambda here, path: None)
    found = look(root)["/etc/fuse.conf"]
    assert found.level is Level.NOTE and "not known" in found.text and "grep" in found.mend


def test_the_group_that_may_use_io_uring(root: Path) -> None:
    (root / "proc/sys/kernel/io_uring_disabled").write_text("1\n")
    (root / "proc/sys/kernel/io_uring_group").write_text("108\n")
    assert "kernel.io_uring_disabled" in look(root, groups=(1000,))
    assert "kernel.io_uring_disabled" not in look(root, groups=(1000, 108))


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
    found = guests.examine(FILE, MOUNTPOINT, proc)
    assert all_can_be_mended(found)
    return found


def blockdev(**keys: Any) -> str:
    return json.dumps(keys)


NODE = ("-blockdev", f"driver=file,filename={FILE},node-name=d")


def test_a_file_whose_name_is_no_text_is_followed(tmp_path: Path) -> None:
    """Not only its descriptor says which file it is; and the line to paste names it."""
    at = os.fsdecode(b"/srv/vm \xff")
    (tmp_path / "7").mkdir()
    words = (b"qemu-system-x86_64", b"-drive", os.fsencode(f"file={at}/disk.img,aio=native"), b"")
    (tmp_path / "7/cmdline").write_bytes(b"\0".join(words))
    (tmp_path / "7/fd").mkdir()
    (tmp_path / "7/fd/9").symlink_to(f"{at}/disk.img")
    found = guests.examine(f"{at}/disk.img", at, tmp_path)
    assert found[0].level is Level.ERROR and "aio=native" in found[0].text
    assert found[0].mend.startswith("healfs attach $'/srv/vm \\377' #")


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


def nested(**bottom: Any) -> str:
    """As Proxmox VE 9 writes it: a filter on a format on a file, one in the other."""
    bottom = {"driver": "file", "filename": FILE, **bottom}
    image = {"driver": "raw", "file": bottom, "node-name": "f"}
    return blockdev(driver="throttle", file=image, **{"node-name": "drive-scsi0"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("-blockdev", nested(aio="io_uring")),
        ("-drive", f'file=json:{{"driver":"file",,"filename":"{FILE}",,"aio":"native"}},if=none'),
    ],
)
def test_a_file_in_the_depth_of_a_node(tmp_path: Path, arguments: tuple[str, str]) -> None:
    option, value = arguments
    if option == "-drive":
        value += ",id=drive-scsi0"
    device = "scsi-hd,bus=a.0,drive=drive-scsi0"
    (finding,) = one(tmp_path, option, value, "-device", "virtio-scsi-pci,id=a", "-device", device)
    assert finding.level is Level.ERROR and "aio=" in finding.text


def test_a_drive_that_is_named_by_its_node(tmp_path: Path) -> None:
    drive = f"file={FILE},if=none,node-name=d"
    (finding,) = one(tmp_path, "-drive", drive, "-device", "virtio-blk-pci,drive=d")
    assert finding.level is Level.OK


@pytest.mark.parametrize(
    "arguments",
    [
        (*NODE, "-device", "virtio-blk-pci,drive=d,werror=ignore,rerror=stop"),
        ("-drive", f"file={FILE},if=virtio,werror=ignore"),
    ],
)
def test_errors_that_the_guest_is_not_told(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (finding,) = one(tmp_path, *arguments)
    assert finding.level is Level.ERROR and finding.text.startswith("werror=ignore: ")


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    file = os.fsdecode(b"/srv/\xe4/disk.img")
    process(tmp_path / "proc", "qemu-system-x86_64", opened=file)
    line = b"qemu-system-x86_64\0-drive\0file=/srv/\xe4/disk.img,if=virtio\0"
    (tmp_path / "proc/7/cmdline").write_bytes(line)
    (finding,) = guests.examine(file, "/srv/x", tmp_path / "proc")
    assert finding.level is Level.OK


def test_no_proc(tmp_path: Path) -> None:
    assert guests.examine(FILE, MOUNTPOINT, tmp_path / "none") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("-drive", f"file={FILE},if=virtio,cache=unsafe"),
        ("-blockdev", nested(cache={"no-flush": True, "direct": True}).replace("drive-scsi0", "d")),
        ("-drive", f"file={FILE},if=virtio,cache.no-flush=on"),
        ("-drive", f"file.filename={FILE},if=virtio,file.cache.no-flush=on"),
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
    (finding,) = one(tmp_path, *arguments, "-device", "virtio-blk-pci,drive=d")
    assert finding.level is Level.ERROR and "flushes are thrown away" in finding.text


@pytest.mark.parametrize(
    ("arguments", "bus"),
    [
        (("-drive", f"file={FILE}"), "ide (IDE or SATA)"),
        (("-hda", FILE), "ide (IDE or SATA)"),
        (("-cdrom", FILE), "ide (IDE or SATA)"),
        ((FILE,), "ide (IDE or SATA)"),
        (("-nographic", FILE), "ide (IDE or SATA)"),
        (("-no-hpet", "-m", "1G", "-hdb", FILE, "-name", "x"), "ide (IDE or SATA)"),
        ((*NODE, "-device", "lsi53c895a", "-device", "scsi-hd,drive=d"), "lsi53c895a, scsi-hd (S"),
        ((*NODE, "-device", "usb-uas", "-device", "scsi-hd,drive=d"), "usb-uas, scsi-hd (USB)"),
        ((*NODE, "-device", "nvme,drive=d,serial=1"), "nvme (NVMe)"),
        (
            (
                *(*NODE, "-device", "virtio-scsi-pci,id=a", "-device", "megasas,id=b"),
                *("-device", "scsi-hd,bus=b.0,drive=d"),
            ),
            "megasas, scsi-hd (SCSI)",
        ),
    ],
    ids=str,
)
def test_guests_that_give_up(tmp_path: Path, arguments: tuple[str, ...], bus: str) -> None:
    (finding,) = one(tmp_path, *arguments)
    assert finding.level is Level.WARNING and finding.text.startswith(bus)


def test_a_scsi_disk_on_virtio_is_well(tmp_path: Path) -> None:
    adapters = ("-device", "virtio-scsi-pci,id=a", "-device", "lsi53c895a,id=b")
    (finding,) = one(tmp_path, *NODE, *adapters, "-device", "scsi-hd,bus=a.0,drive=d")
    assert finding.level is Level.OK and "virtio-scsi-pci, scsi-hd" in finding.text


def test_a_descriptor_that_was_passed(tmp_path: Path) -> None:
    """What it is nobody says; with a single one there is no doubt."""
    passed = ("-blockdev", "driver=file,filename=/dev/fdset/2,node-name=d,aio=native")
    device = ("-device", "virtio-blk-pci,drive=d")
    (finding,) = one(tmp_path, "-add-fd", "fd=9,set=2", *passed, *device)
    assert finding.level is Level.ERROR and "aio=native" in finding.text
    process(
        tmp_path,
        *("qemu-system-x86_64", *passed, *device, "-blockdev"),
        "driver=file,filename=/dev/fdset/3,node-name=e",
        pid=8,
    )
    found = guests.examine(FILE, MOUNTPOINT, tmp_path)
    assert {f.level for f in found if "pid 8" in f.check} == {Level.NOTE}


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("qemu-system-x86_64", (), "not name the disk's file"),
        ("qemu-system-x86_64", ("-readconfig", "/etc/vm1.cfg"), "not name the disk's file"),
        ("qemu-system-x86_64", ("-kernel", FILE), "not name the disk's file"),
        ("qemu-system-x86_64", NODE, "no device"),
        ("qemu-system-x86_64", ("-drive", f"if=scsi,file={FILE}"), "scsi: how long"),
        ("qemu-system-x86_64", (*NODE, "-device", "floppy,drive=d"), "floppy: how long"),
        ("qemu-system-x86_64", (*NODE, "-device", "scsi-hd,drive=d"), "scsi-hd: how long"),
        ("qemu-system-aarch64", ("-drive", f"file={FILE}"), "the machine's own bus: how long"),
        (
            "qemu-system-x86_64",
            (
                *(*NODE, "-device", "virtio-scsi-pci", "-device", "lsi53c895a"),
                *("-device", "scsi-hd,drive=d"),
            ),
            "scsi-hd: how long",
        ),
    ],
    ids=str,
)
def test_what_a_command_line_does_not_say(
    tmp_path: Path, program: str, arguments: tuple[str, ...], words: str
) -> None:
    (finding,) = one(tmp_path, *arguments, program=program)
    assert finding.level is Level.NOTE and words in finding.text


def test_a_name_from_where_it_was_started(tmp_path: Path) -> None:
    process(tmp_path, "qemu-system-x86_64", "-hda", "vm1/../vm1/disk.img")
    (tmp_path / "7/cwd").symlink_to("/srv")
    assert [f.level for f in guests.examine(FILE, MOUNTPOINT, tmp_path)] == [Level.WARNING]


def test_a_machine_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may list its descriptors; what it was told to open is to be seen."""
    process(tmp_path, "qemu-system-x86_64", "-drive", f"file={FILE},if=virtio", pid=7)
    process(tmp_path, "qemu-system-x86_64", "-drive", "file=/other,if=virtio", pid=8)
    listed = Path.iterdir

    def iterdir(self: Path) -> Any:
        if self.name == "fd":
            raise PermissionError
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [guest.pid for guest in guests.guests_of(FILE, tmp_path)] == [7]


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
    read_only = {"values": {"read_only": {"value": True}}}
    lacks = {"discard": False, "flush": False}
    found = disk.examine(status(configuration=read_only, backend=lacks))
    assert {finding.level for finding in found} == {Level.OK}


@pytest.mark.parametrize(
    ("changed", "level", "mend"),
    [
        ({"state": "stalled", "reason": "refused"}, Level.WARNING, "healfs reconnect"),
        (
            {"retrying": {"requests": 1, "seconds": 5.0, "reason": "No space left on device"}},
            *(Level.WARNING, f"healfs status {MOUNTPOINT}"),
        ),
        ({"state": "connecting"}, Level.WARNING, f"healfs events {MOUNTPOINT}"),
        ({"state": "replaying"}, Level.WARNING, f"healfs status {MOUNTPOINT}"),
        ({"state": "paused"}, Level.WARNING, f"healfs resume {MOUNTPOINT}"),
        ({"state": "mismatch"}, Level.WARNING, "healfs accept"),
        ({"state": "faulted"}, Level.ERROR, "healfs umount --force"),
        ({"state": "closed"}, Level.WARNING, f"healfs status {MOUNTPOINT}"),
        ({"backend": {"flush": False}}, Level.ERROR, "flush = true"),
        (
            {"backend": {"flush": False}, "notes": ["the server cannot flush: nothing is"]},
            *(Level.ERROR, "flush = true"),
        ),
        ({"backend": {"write_zeroes": False}}, Level.NOTE, "qemu-nbd"),
        ({"source": "/a", "backend": {"write_zeroes": False}}, Level.NOTE, "XFS"),
        ({"source": "nbd/a", "backend": {"write_zeroes": False}}, Level.NOTE, "XFS"),
        ({"backend": {"discard": False}}, Level.NOTE, "--discard=unmap"),
        (
            {"policy": {"read": {"rerror": "retry", "retry_timeout": 30.0, "then": "report"}}},
            *(Level.NOTE, f"healfs policy --read-retry-timeout 0 {MOUNTPOINT}"),
        ),
        ({"backend": {"fua": False}}, Level.NOTE, "fua = true"),
        ({"notes": ["the keeper is gone: the"]}, Level.WARNING, f"healfs umount {MOUNTPOINT}"),
        ({"notes": ["the write log's 65 MiB of memory"]}, Level.WARNING, "LimitMEMLOCK"),
        ({"notes": ["news"]}, Level.WARNING, "healfs-semantics(7)"),
        ({"policy": {"write": {"werror": "report"}}}, Level.NOTE, "healfs policy --werror retry"),
        (
            {"mountpoint": "/a b", "state": "paused"},
            *(Level.WARNING, "healfs resume '/a b'"),
        ),
    ],
    ids=str,
)
def test_each_thing_a_disk_lacks(changed: dict[str, Any], level: Level, mend: str) -> None:
    found = disk.examine(status(**changed))
    (bad,) = (f for f in found if f.level is not Level.OK)
    assert bad.level is level and mend in bad.mend and all_can_be_mended(found)


def test_every_state_and_note_has_a_mend_of_its_own() -> None:
    assert {*disk._STATES, "ready", "closed"} == set(State)
    code = "".join(path.read_text() for path in Path(healfs.__file__).parent.rglob("*.py"))
    doctors = Path(disk.__file__).read_text()
    for begin in disk._NOTES:
        # Where the text is made, and in the table.
        assert code.count(f'"{begin}') > doctors.count(f'"{begin}'), begin


def test_a_disk_that_nobody_knows_yet() -> None:
    found = disk.examine({**status(), "backend": None})
    assert Level.NOTE in {finding.level for finding in found}
    assert disk.examine({})  # an older daemon's: no traceback


def test_plain_python_is_said(root: Path) -> None:
    found = look(root, plain="they are not compiled")["compiled modules"]
    assert found.level is Level.NOTE and "they are not compiled" in found.text
    assert "make setup" in found.mend
