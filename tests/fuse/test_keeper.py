"""The keeper waits for nobody, and touches neither the disk nor the log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from healfs.fuse import mount
from tests.backends.nbd_servers import wait_until
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import Opener
from tests.mounts import HEALFS

BLOCK = b"x" * 4096
GENEROUS = 120.0


# --- nobody reads standard error ----------------------------------------------------------------


@pytest.fixture
def full() -> Iterator[tuple[int, int]]:
    """A pipe without room: the end to read, and the other, which is the test's to close."""
    reader, writer = os.pipe()
    filling = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filling, b"\n" * 4096)
    os.close(filling)
    yield reader, writer
    os.close(reader)


def _status(commands: Commands) -> dict[str, dict[str, int]]:
    done = commands.run("status", commands.mountpoint, "--json", seconds=GENEROUS)
    assert done.returncode == 0, done.stderr
    answer: dict[str, dict[str, int]] = json.loads(done.stdout)
    return answer


def test_a_log_that_nobody_reads_holds_up_nobody(
    commands: Commands, image: Path, full: tuple[int, int]
) -> None:
    """A journal that stalls: its disk may be this one."""
    reader, writer = full
    keeper = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", HEALFS, "mount"),
            *(str(image), str(commands.mountpoint), "--foreground"),
        ],
        env=commands.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
    )
    os.close(writer)
    hard_limit = threading.Timer(600, keeper.kill)
    hard_limit.start()
    one: Agent | None = None
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == f"{commands.file}\n"
        one = Agent(commands.file)
        assert one.ok("pwrite", 0, BLOCK) == 4096
        worker = _status(commands)["pids"]["worker"]
        os.kill(worker, signal.SIGKILL)
        assert one.ok("pwrite", 4096, BLOCK) == 4096  # another worker: the keeper did not wait
        assert not one.do("fsync").errno
        assert _status(commands)["pids"]["worker"] != worker
        one.kill()
        one.ended()
        # Now somebody reads: what is said next begins with how much was not heard.
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(reader, 1 << 16).strip(b"\n") == b"":
                pass
        os.set_blocking(reader, True)
        keeper.send_signal(signal.SIGTERM)
        with open(reader, closefd=False) as said:
            text = said.read()
        assert keeper.wait(GENEROUS) == 0
        assert "lines dropped: nobody read them\n" in text and "asked to end" in text
        assert "another one is started" not in text  # this one was dropped
    finally:
        hard_limit.cancel()
        keeper.kill()
        keeper.communicate(timeout=GENEROUS)
        if one is not None:
            one.kill()
            one.ended()
    commands.nothing_left(GENEROUS)


# --- what it has in its hands -------------------------------------------------------------------


def test_the_keeper_touches_no_backend_no_mount_and_no_log(
    image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """It holds the log's memory as a descriptor, and that is all."""
    mount = healfs_mount(image)
    assert agent(mount.file).ok("pwrite", 0, BLOCK) == 4096
    mount.kill_worker()
    pids = mount.status()["pids"]

    def named(pid: int, *names: str) -> list[str]:
        process = Path(f"/proc/{pid}")
        links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
        found = (process / "maps").read_text().splitlines()
        for link in links:
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(link))
        return [one for one in found if any(name in one for name in names)]

    touched = str(image), str(mount.mountpoint)
    log = "/memfd:healfs-log (deleted)"
    assert named(pids["keeper"], *touched) == []
    assert named(pids["keeper"], log) == [log]  # the descriptor: no mapping
    # They would be seen: the worker has all of it.
    assert named(pids["worker"], *touched)
    assert len(named(pids["worker"], log)) > 1


# --- its run-time files -------------------------------------------------------------------------


@pytest.fixture
def small(commands: Commands) -> Iterator[Path]:
    """What fills the file system of the runtime directory, until it is removed."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "x", commands.runtime]).returncode:
        pytest.skip("no tmpfs")
    try:
        commands.runtime.chmod(0o700)
        fill = commands.runtime / "log" / "fill"
        fill.parent.mkdir()
        yield fill
    finally:
        commands.run("umount", "--force", commands.mountpoint)
        subprocess.run(["umount", "-l", commands.runtime], check=True)


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), open(file, "ab", buffering=0) as full:
        while True:
            full.write(bytes(4096))


def test_a_full_run_time_directory(commands: Commands, image: Path, small: Path) -> None:
    """A mount that nobody could find is not made, and what changed is written as soon as it can."""
    _fill(small)
    done = commands.mount(image)
    assert done.returncode == 1 and not commands.is_mounted
    assert "mount.json.new: No space left on device" in done.stderr
    small.unlink()
    assert commands.mount(image).returncode == 0
    _fill(small)
    commands.kill_worker()
    (record,) = commands.runtime.glob("*/mount.json")
    worker = _status(commands)["pids"]["worker"]
    assert json.loads(record.read_text())["pids"]["worker"] != worker
    small.unlink()
    wait_until(
        lambda: json.loads(record.read_text())["pids"]["worker"] == worker, "the record", GENEROUS
    )


def test_a_runtime_directory_that_is_relative(commands: Commands, image: Path) -> None:
    prefix = ("env", "-C", str(commands.directory), "HEALFS_RUNTIME_DIR=run")
    assert commands.mount(image, prefix=prefix).returncode == 0
    done = commands.run("events", "--json", commands.mountpoint)
    assert "HEALFS_MOUNTED" in done.stdout
    done = commands.run("umount", "mnt", prefix=prefix)
    assert done.returncode == 0, done.stderr


# --- killed while it mounts ---------------------------------------------------------------------

KILLED = """
import os, sys
if "healfs.daemon.keeper" in sys.orig_argv and not os.path.exists({once!r}):
    from healfs.fuse import mount
    def killed(mountpoint):
        open({once!r}, "w").close()
        os.kill({whom}, 9)
    mount.connection_of = killed
"""


@pytest.mark.parametrize("whom", ["os.getpid()", "0"], ids=["alone", "with-its-worker"])
@pytest.mark.parametrize("then", ["umount", "mount"])
def test_a_keeper_that_is_killed_when_it_has_just_mounted(
    commands: Commands, image: Path, whom: str, then: str
) -> None:
    """Nobody has the FUSE descriptor, and no record the connection's number."""
    site = commands.directory / "site"
    site.mkdir()
    once = commands.directory / "once"
    (site / "sitecustomize.py").write_text(KILLED.format(once=str(once), whom=whom))
    commands.environment["PYTHONPATH"] = str(site)
    done = commands.mount(image)
    assert done.returncode == 1 and once.exists()
    if whom == "0":  # nobody was left to do it
        assert commands.is_mounted
        if then == "umount":
            done = commands.run("umount", commands.mountpoint)
            assert done.returncode == 0, done.stderr
    if then == "mount":  # as systemd does
        done = commands.mount(image)
        assert done.returncode == 0, done.stderr
        assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left(GENEROUS)


def test_what_is_served_is_not_taken_for_a_dead_mount(commands: Commands, image: Path) -> None:
    assert commands.mount(image).returncode == 0
    assert mount.never_served(str(commands.mountpoint)) is None
    assert commands.run("umount", commands.mountpoint).returncode == 0


# --- what is asked of it ------------------------------------------------------------------------


def test_a_limit_that_forbids_the_logs_memory_is_one_line(commands: Commands, image: Path) -> None:
    done = commands.mount(image, prefix=("prlimit", "--fsize=1000000"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the write log's memory: File too large; lower --log-size" in done.stderr
    commands.nothing_left(GENEROUS)


def test_what_is_no_request_for_an_upgrade_ends_no_mount(commands: Commands, image: Path) -> None:
    assert commands.mount(image).returncode == 0
    (door,) = commands.runtime.glob("*/keeper")
    for packet in b"[" * 60000, b'{"upgrade": {"path": null, "interpreter": "\\u0000"}}', b"1":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.connect(str(door))
            socket.send_fds(one, [packet], [theirs.fileno()])
            ours.settimeout(GENEROUS)
            theirs.close()
            assert "that is no request for an upgrade" in ours.recv(4096).decode()
    assert commands.run("umount", commands.mountpoint).returncode == 0
