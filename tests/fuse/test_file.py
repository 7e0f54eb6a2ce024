"""The disk's file as a program sees it: sizes, flags, attributes, users, a loop device on it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.backends.ext4 import Ext4
from tests.backends.nbd_servers import NbdServer, wait_until
from tests.conftest import Mounter
from tests.fuse.agent import KEEP_SIZE, ZERO_RANGE, Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import NOBODY, SIZE, Opener, Rules
from tests.fuse.control import control

BLOCK = b"x" * 4096
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
REFUSED = (errno.EPERM, errno.EACCES)
TIME_LIMIT = 240


def test_the_end_of_the_disk(image: Path, healfs_mount: Mounter, agent: Opener) -> None:
    one = agent(healfs_mount(image).file)
    assert one.do("pwrite", SIZE, b"x").errno == errno.ENOSPC
    assert one.do("pwrite", SIZE - 1, b"xy").errno == errno.ENOSPC
    assert one.do("pwrite", SIZE + (1 << 30), b"x").errno == errno.ENOSPC
    assert one.ok("pwrite", SIZE - 1, b"z") == 1
    assert one.ok("pread", SIZE - 1, 512) == b"z"
    assert one.ok("pread", SIZE, 512) == b""
    assert one.ok("pread", SIZE + (1 << 30), 512) == b""
    assert one.ok("lseek", 0, os.SEEK_END) == SIZE
    assert one.do("fallocate", ZERO_RANGE, SIZE - 512, 1024).errno == errno.ENOSPC
    assert one.do("fallocate", 0, 0, 4096).errno == errno.EOPNOTSUPP
    one.ok("fallocate", ZERO_RANGE | KEEP_SIZE, SIZE - 512, 1024)
    assert one.ok("pread", SIZE - 1, 1) == b"\0"
    assert image.stat().st_size == SIZE


def test_writes_past_the_end_in_an_outage_are_refused_at_once(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    one = agent(mount.file)
    with control(mount) as disk:
        server.kill()
        disk.state("stalled")
        assert one.do("pwrite", SIZE, b"x").errno == errno.ENOSPC
        assert one.ok("pread", SIZE, 512) == b""
        assert one.do("truncate", 0).errno in REFUSED
        assert disk.status()["requests"]["parked"] == 0


def test_what_no_disk_does_is_refused(image: Path, healfs_mount: Mounter, agent: Opener) -> None:
    mount = healfs_mount(image)
    one = agent(mount.file)
    for size in (0, SIZE - 1, SIZE + 1):
        assert one.do("truncate", size).errno in REFUSED
    one.ok("truncate", SIZE)
    file, other = str(mount.file), str(mount.mountpoint / "other")
    for call, *arguments in (
        ("mkdir", other),
        ("mknod", other),
        ("symlink", "x", other),
        ("link", file, other),
        ("rename", file, other),
        ("unlink", file),
        ("rmdir", str(mount.mountpoint / "disk.img")),
    ):
        expected = (*REFUSED, errno.ENOTDIR) if call == "rmdir" else REFUSED
        assert one.do("namespace", call, *arguments).errno in expected, call
    new = Agent(mount.mountpoint / "new", os.O_RDWR | os.O_CREAT)
    assert new.opened.errno in REFUSED
    new.kill()
    new.ended()
    assert one.ok("namespace", "listdir", str(mount.mountpoint)) == ["disk.img"]
    # O_TRUNC asks for a size, too.
    truncating = Agent(mount.file, os.O_RDWR | os.O_TRUNC)
    assert truncating.opened.errno in REFUSED
    truncating.kill()
    truncating.ended()
    assert one.ok("lseek", 0, os.SEEK_END) == SIZE


def test_attributes_are_changed_and_remembered(
    image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(image)
    one = agent(mount.file)
    file = str(mount.file)
    before = os.stat_result(one.ok("namespace", "stat", file))
    assert stat.S_ISREG(before.st_mode) and stat.S_IMODE(before.st_mode) == 0o600
    assert before.st_size == SIZE and before.st_uid == 0 and before.st_nlink == 1
    one.ok("namespace", "chmod", file, 0o640)
    one.ok("namespace", "chown", file, 64055, 108)
    one.ok("namespace", "utime", file, [1_000_000_000, 1_234_567_890])
    after = os.stat_result(one.ok("namespace", "stat", file))
    assert stat.S_IMODE(after.st_mode) == 0o640
    assert (after.st_uid, after.st_gid, after.st_mtime) == (64055, 108, 1_234_567_890)
    assert image.stat().st_uid == 0  # healfs's own, not the image's


def test_many_opens_see_each_others_bytes(
    image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(image)
    flags = [os.O_RDWR, os.O_RDWR | os.O_DIRECT, os.O_RDWR | os.O_DSYNC, os.O_RDWR | os.O_SYNC]
    agents = [agent(mount.file, flag) for flag in flags]
    for number, writer in enumerate(agents):
        assert writer.ok("pwrite", 4096 * number + 1, bytes([number]) * 4096) == 4096
        for reader in agents:
            assert reader.ok("pread", 4096 * number + 1, 4096) == bytes([number]) * 4096
    reading = agent(mount.file, os.O_RDONLY)
    assert reading.do("pwrite", 0, b"x").errno == errno.EBADF
    for offset, length in ((0, 1), (511, 2), (4095, 4098), (SIZE - 3, 3)):
        assert agents[1].ok("pwrite", offset, b"u" * length) == length
        assert agents[0].ok("pread", offset, length) == b"u" * length


def test_append_is_past_the_end(image: Path, healfs_mount: Mounter, agent: Opener) -> None:
    one = agent(healfs_mount(image).file, os.O_RDWR | os.O_APPEND)
    assert one.do("write", b"x").errno == errno.ENOSPC
    assert one.ok("lseek", 0, os.SEEK_END) == SIZE


def test_a_synced_write_is_a_flush_of_its_own(
    image: Path, tmp_path: Path, fault: Rules, healfs_mount: Mounter, agent: Opener
) -> None:
    """A file is told by RWF_DSYNC, so it works while every FLUSH fails."""
    fault('[[rule]]\nkinds = ["FLUSH"]\nerrno = "EIO"\n')
    mount = healfs_mount(image, "--fault", str(tmp_path / "faults.toml"), "--werror", "report")
    plain, synced = agent(mount.file), agent(mount.file, os.O_RDWR | os.O_DSYNC)
    assert synced.ok("pwrite", 4096, BLOCK) == 4096  # FUA, no FLUSH to the file
    assert plain.ok("pwrite", 0, BLOCK) == 4096
    assert plain.do("fsync").errno == errno.EIO
    # From the failure on it proves nothing either, until all was written again.
    assert synced.do("pwrite", 8192, BLOCK).errno == errno.EIO
    fault("")
    mount.policy("--werror", "retry")  # the new rules are seen a moment later
    plain.ok("fsync")
    assert synced.ok("pwrite", 8192, BLOCK) == 4096


def test_read_only(image: Path, healfs_mount: Mounter) -> None:
    image.write_bytes(b"r" * SIZE)
    image.chmod(0o400)
    mount = healfs_mount(image, "--read-only")
    writing = Agent(mount.file, os.O_RDWR)
    assert writing.opened.errno in (errno.EROFS, errno.EACCES)
    writing.kill()
    writing.ended()
    reading = Agent(mount.file, os.O_RDONLY)
    assert reading.ok("pread", SIZE - 512, 1024) == b"r" * 512
    assert reading.do("namespace", "chmod", str(mount.file), 0o600).errno == errno.EROFS
    reading.kill()
    reading.ended()
    assert mount.umount().returncode == 0


@pytest.mark.parametrize("name", ["vda", "a b, c\\d.raw", "ü.img", "-x", "x" * 255])
def test_the_name_is_free(image: Path, healfs_mount: Mounter, agent: Opener, name: str) -> None:
    mounted = healfs_mount(image, f"--name={name}", name=name if name == "vda" else "disk.img")
    file = mounted.mountpoint / name
    assert mounted.printed == f"{file}\n" and mounted.status()["file"] == str(file)
    one = agent(file)
    assert one.ok("pwrite", 0, BLOCK) == 4096
    assert one.ok("namespace", "listdir", str(mounted.mountpoint)) == [name]


def test_df_and_ls(image: Path, healfs_mount: Mounter) -> None:
    mount = healfs_mount(image)
    df = ("df", "--output=size,avail,target", "-B1", mount.mountpoint)
    done = subprocess.run(df, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.stdout.splitlines()[1].split() == [str(SIZE), "0", str(mount.mountpoint)]


def _read_as_nobody(file: Path) -> subprocess.CompletedProcess[bytes]:
    command = [*AS_NOBODY, "head", "-c", "512", str(file)]
    return subprocess.run(command, capture_output=True, timeout=TIME_LIMIT)


def test_allow_other_lets_other_users_in(image: Path, healfs_mount: Mounter, agent: Opener) -> None:
    mine, theirs = healfs_mount(image), None
    assert _read_as_nobody(mine.file).returncode
    mine.umount()
    theirs = healfs_mount(image, "--allow-other")
    theirs.mountpoint.parent.chmod(0o755)
    assert _read_as_nobody(theirs.file).returncode  # the file's mode still says no
    one = agent(theirs.file)
    one.ok("namespace", "chown", str(theirs.file), NOBODY, NOBODY)  # as libvirt does
    done = _read_as_nobody(theirs.file)
    assert done.returncode == 0 and done.stdout == bytes(512)


def test_an_ordinary_user_mounts_through_fusermount3(other_users: None, commands: Commands) -> None:
    """In a mount namespace whose /dev/fuse is open to all, as udev makes it."""
    if shutil.which("fusermount3") is None:
        pytest.skip("no fusermount3")
    image = commands.directory / "disk.raw"
    with open(image, "xb") as file:
        file.truncate(SIZE)
    for path in (commands.directory, commands.mountpoint, commands.runtime, image):
        os.chown(path, NOBODY, NOBODY)
    node = commands.directory / "fuse"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    node.chmod(0o666)
    commands.environment["HOME"] = str(commands.directory)
    holder = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c"),
            f"mount --bind {node} /dev/fuse && echo ready && exec sleep 1200",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip("no mount namespace of our own")
        inside = ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", *AS_NOBODY)
        _use_as_user(commands, image, inside)
    finally:
        holder.kill()
        holder.communicate(timeout=TIME_LIMIT)


def _use_as_user(commands: Commands, image: Path, inside: tuple[str, ...]) -> None:
    done = commands.mount(image, prefix=inside)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{commands.file}\n"
    table = subprocess.run(
        [*inside, "findmnt", "-no", "FSTYPE,OPTIONS", commands.mountpoint],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    ).stdout
    assert table.startswith("fuse.healfs") and f"user_id={NOBODY}" in table
    dd = ["dd", f"of={commands.file}", "bs=4096", "conv=notrunc,fsync", "status=none"]
    subprocess.run([*inside, *dd], input=BLOCK, check=True, timeout=TIME_LIMIT)
    assert image.read_bytes()[:4096] == BLOCK
    done = commands.run("status", commands.mountpoint, prefix=inside)
    assert done.returncode == 0 and "ready" in done.stdout
    done = commands.run("umount", commands.mountpoint, prefix=inside)
    assert done.returncode == 0, done.stderr
    assert commands.processes() == [] and commands.run_files() == []


def test_a_loop_device_on_the_file(
    server: NbdServer, healfs_mount: Mounter, tmp_path: Path
) -> None:
    """mkfs, mount, write through an outage, umount, fsck."""

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIME_LIMIT)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    mount = healfs_mount(server.uri())
    where = tmp_path / "fs"
    where.mkdir()
    found = subprocess.run(
        ["losetup", "--find", "--show", mount.file], capture_output=True, text=True, timeout=60
    )
    if found.returncode:
        pytest.skip(f"no loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        run("mkfs.ext4", "-q", device)
        run("mount", device, where)
        run("sh", "-c", f"head -c 2M /dev/urandom >{where}/a && sync -f {where}/a")
        with control(mount) as disk:
            server.kill()
            disk.state("stalled")
            copying = subprocess.Popen(["sh", "-c", f"cp {where}/a {where}/b; sync -f {where}/b"])
            disk.parked(1)
            server.start()
            assert copying.wait(TIME_LIMIT) == 0
        run("cmp", where / "a", where / "b")
        run("umount", where)
        run("fsck.ext4", "-fn", device)
    finally:
        server.kill()
        server.start()
        subprocess.run(["umount", "-l", where], check=False, capture_output=True, timeout=60)
        subprocess.run(["losetup", "-d", device], check=False, timeout=60)
    # The kernel lets go of the file a moment after the device is gone.
    wait_until(lambda: not mount.umount(check=False).returncode, "the end of the mount")


def test_a_size_that_no_guest_counts_in_is_noted(commands: Commands, tmp_path: Path) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(3 * 512 + 100))
    note = "its size is no multiple of 512: a guest may not see the last 100 bytes"
    done = commands.mount(odd)
    assert (done.returncode, done.stderr) == (0, f"healfs: {note}\n")
    status = json.loads(commands.run("status", commands.mountpoint, "--json").stdout)
    assert note in status["notes"] and status["size"] == 3 * 512 + 100
    assert commands.run("umount", commands.mountpoint).returncode == 0


def test_a_file_system_that_had_an_error_is_mended_below_the_disk(
    ext4: Ext4, healfs_mount: Mounter, agent: Opener
) -> None:
    """The daemon does not hold it: it can be unmounted and checked. Nothing was lost."""
    mount = healfs_mount(ext4.image)
    writer = agent(mount.file)
    with control(mount) as disk:
        assert writer.ok("pwrite", 0, b"a" * 4096) == 4096
        ext4.fail()
        writer.ask("pwrite", 4096, b"b" * 4096)
        status = disk.state("stalled")
        assert "unmount it, fsck, mount it again" in status["reason"]
        disk.until(lambda status: status["reason"].startswith(str(ext4.image)))  # tried again
        ext4.mend()
        assert writer.answer().value == 4096
        writer.ok("fsync")
        assert ext4.image.read_bytes()[:8192] == b"a" * 4096 + b"b" * 4096
    writer.kill()
    writer.ended()
    mount.umount()
