"""What cannot be: one line on standard error, status 2 (1 where it may be another time), nothing
changed."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, nbdkit, qemu_nbd, wait_until
from tests.fuse.commands import Commands
from tests.mounts import HEALFS

SYSCTLS = ("default_request_timeout", "max_request_timeout")


def _refused(commands: Commands, *arguments: str | Path, says: str, status: int = 2) -> None:
    done = commands.run(*arguments)
    assert done.returncode == status, (done.returncode, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("healfs: ") and says in line
    commands.nothing_left()


def _mount_refused(
    commands: Commands,
    source: str | Path,
    *options: str,
    says: str,
    at: Path | None = None,
    status: int = 2,
) -> None:
    at_ = at or commands.mountpoint
    _refused(commands, "mount", source, at_, *options, says=says, status=status)
    assert at is not None or not list(commands.mountpoint.iterdir())


def test_the_source_is_missing(commands: Commands, tmp_path: Path) -> None:
    _mount_refused(commands, tmp_path / "nowhere", says="no such file")


def test_the_source_is_a_directory(commands: Commands, tmp_path: Path) -> None:
    _mount_refused(commands, tmp_path, says="is a directory")


def test_the_source_is_neither_file_nor_device(commands: Commands, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    _mount_refused(commands, fifo, says="neither a regular file nor a block device")


def test_the_source_is_empty(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    _mount_refused(commands, tmp_path / "empty", says="0 bytes")


def test_an_export_is_empty(commands: Commands) -> None:
    with nbdkit("memory", "0") as server:
        _mount_refused(commands, server.uri(), says="size 0")


def test_created_twice(commands: Commands, image: Path) -> None:
    _mount_refused(commands, image, "--create", "1M", says="exists")
    assert image.stat().st_size == 16 << 20


@pytest.mark.parametrize("option", ["--create", "--size"])
def test_size_0(commands: Commands, tmp_path: Path, option: str) -> None:
    options = (option, "0") if option == "--create" else (option, "0", "--no-wait")
    _mount_refused(commands, tmp_path / "new", *options, says="0 bytes")
    assert not (tmp_path / "new").exists()


def test_the_mountpoint_is_missing(commands: Commands, image: Path) -> None:
    missing = commands.directory / "missing"
    _mount_refused(commands, image, at=missing, says="no such directory")
    assert not missing.exists()


def test_the_mountpoint_is_a_file(commands: Commands, image: Path) -> None:
    file = commands.directory / "file"
    file.touch()
    _mount_refused(commands, image, at=file, says="not a directory")


def test_the_mountpoint_is_not_empty(commands: Commands, image: Path) -> None:
    (commands.mountpoint / "mine").touch()
    _mount_refused(commands, image, at=commands.mountpoint, says="not empty")
    assert [path.name for path in commands.mountpoint.iterdir()] == ["mine"]


def test_the_mountpoint_is_in_use(commands: Commands, image: Path, tmp_path: Path) -> None:
    assert commands.mount(image).returncode == 0
    second = tmp_path / "second.img"
    second.write_bytes(bytes(4096))
    before = commands.processes(), commands.run_files()
    done = commands.mount(second)
    assert done.returncode == 1 and "mounted there already" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (commands.processes(), commands.run_files()) == before
    assert commands.run("status", commands.mountpoint).returncode == 0


@pytest.mark.parametrize("source", ["iscsi://host/target", "http://x/", "nbdss://localhost/"])
def test_the_scheme_is_unknown(commands: Commands, source: str) -> None:
    _mount_refused(commands, source, says="unknown scheme")


@pytest.mark.parametrize(
    "source", ["nbd://", "nbd+unix:///", "nbd+unix:///?path=/x", "nbd://h:99999/", "nbd://u@h/"]
)
def test_the_uri_is_none(commands: Commands, source: str) -> None:
    _mount_refused(commands, source, says=source.rpartition("?")[0])


def test_the_export_name_is_wrong(commands: Commands, image: Path) -> None:
    with qemu_nbd(image, export="right") as server:
        _mount_refused(commands, server.uri("wrong"), says="wrong")


@pytest.fixture
def no_nbd() -> Iterator[int]:
    """The port of a server that speaks something else."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client, contextlib.suppress(OSError):  # it has hung up
                    client.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n" * 10)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_the_server_speaks_no_nbd(commands: Commands, no_nbd: int) -> None:
    _mount_refused(commands, f"nbd://127.0.0.1:{no_nbd}/", says="NBD")


def test_the_export_is_read_only(commands: Commands, image: Path) -> None:
    with nbdkit("-r", "file", str(image)) as server:
        _mount_refused(commands, server.uri(), says="--read-only")


@pytest.mark.parametrize("duration", ["5", "-1s", "1d", "five", "1e3s", ""])
def test_a_bad_duration(commands: Commands, image: Path, duration: str) -> None:
    _mount_refused(commands, image, f"--retry-timeout={duration}", says="duration")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rerror", "enospc"), "--rerror"),
        (("--read-then", "enospc"), "enospc is for writes only"),
        (("--then", "retry"), "--then"),
        (("--werror", "panic"), "--werror"),
        (("--retry-interval", "0"), "retry-interval"),
        (("--slow-after", "1ms"), "--slow-after"),
        (("--name", "a/b"), "--name"),
        (("--name", ""), "--name"),
        (("--no-wait",), "--size"),
        (("--size", "1G"), "--no-wait"),
        (("--device", "floppy"), "--device"),
        (("--nonsense",), "--nonsense"),
        (("one", "too many"), "unexpected"),
        (("--fault", "/nonexistent"), "/nonexistent"),
    ],
)
def test_bad_options(commands: Commands, image: Path, options: tuple[str, ...], says: str) -> None:
    _mount_refused(commands, image, *options, says=says)


def test_bad_fault_rules(commands: Commands, image: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nerrno = "EWHATEVER"\n')
    _mount_refused(commands, image, "--fault", str(rules), says="EWHATEVER")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no verb"),
        (("munt",), "munt"),
        (("mount",), "SOURCE"),
        (("mount", "x"), "MOUNTPOINT"),
        (("status", "/"), "not a healfs mount"),
        (("status", "/nonexistent", "--json"), "not a healfs mount"),
        (("policy", "/"), "not a healfs mount"),
        (("policy", "/", "--rerror", "enospc"), "--rerror"),
        (("umount", "/"), "not a healfs mount"),
        (("umount",), "MOUNTPOINT"),
    ],
)
def test_bad_commands(commands: Commands, arguments: tuple[str, ...], says: str) -> None:
    _refused(commands, *arguments, says=says)


def test_a_policy_that_cannot_be_changes_nothing(commands: Commands, image: Path) -> None:
    assert commands.mount(image, "--werror", "stop").returncode == 0
    before = commands.run("policy", commands.mountpoint).stdout
    done = commands.run("policy", commands.mountpoint, "--werror", "report", "--then", "retry")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert commands.run("policy", commands.mountpoint).stdout == before


def test_a_second_healfs_on_the_same_file(commands: Commands, image: Path) -> None:
    assert commands.mount(image).returncode == 0
    with Commands() as second:
        _mount_refused(second, image, says="in use", status=1)
        _mount_refused(second, image, "--read-only", says="in use", status=1)
    assert commands.run("umount", commands.mountpoint).returncode == 0


def test_a_second_healfs_on_the_same_export(commands: Commands, server: NbdServer) -> None:
    assert commands.mount(server.uri()).returncode == 0
    with Commands() as second:
        _mount_refused(second, server.uri(), says="in use", status=1)
    assert commands.run("umount", commands.mountpoint).returncode == 0


def test_an_image_that_qemu_has_open(commands: Commands, image: Path) -> None:
    with qemu_nbd(image):
        _mount_refused(commands, image, says="QEMU", status=1)


def test_qemu_refuses_what_healfs_has(commands: Commands, image: Path) -> None:
    assert commands.mount(image).returncode == 0
    command = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode and "lock" in done.stderr


def test_a_block_device_that_is_mounted(commands: Commands, tmp_path: Path) -> None:
    where, disk = tmp_path / "mounted", tmp_path / "fs.img"
    where.mkdir()
    disk.write_bytes(bytes(8 << 20))
    subprocess.run(["mkfs.ext4", "-q", disk], check=True, timeout=60)
    done = subprocess.run(
        ["losetup", "--find", "--show", disk], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        subprocess.run(["mount", device, where], check=True, timeout=60)
        _mount_refused(commands, device, says="in use", status=1)
    finally:
        subprocess.run(["umount", "-l", where], check=False, timeout=60)
        subprocess.run(["losetup", "-d", device], check=False, timeout=60)


@pytest.mark.parametrize("sysctl", SYSCTLS)
def test_fuse_time_outs_of_the_kernel(
    commands: Commands, image: Path, tmp_path: Path, sysctl: str
) -> None:
    """In a mount namespace, over the real file: the other mounts of this host live on."""
    real = Path("/proc/sys/fs/fuse", sysctl)
    if not real.exists():
        pytest.skip(f"this kernel has no fs.fuse.{sysctl}")
    value = tmp_path / "value"
    value.write_text("30\n")
    words = [str(HEALFS), "mount", str(image), str(commands.mountpoint)]
    script = f"mount --bind {value} {real} && exec {shlex.join(words)}"
    done = commands.run(prefix=["unshare", "--mount", "sh", "-c", script])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"sysctl fs.fuse.{sysctl}=0" in line
    commands.nothing_left()


def test_what_was_refused_did_not_lock(
    commands: Commands, image: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _mount_refused(commands, image, "--read-only", "--create", "1M", says="--create")
    (commands.mountpoint / "mine").touch()
    _mount_refused(commands, image, at=commands.mountpoint, says="not empty")
    (commands.mountpoint / "mine").unlink()
    assert commands.mount(image).returncode == 0
    wait_until(lambda: commands.is_mounted, "a mount")
