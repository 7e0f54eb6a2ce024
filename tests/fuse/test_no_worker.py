"""While no worker runs: one dies after the other, one cannot even be killed, none may come."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, wait_until
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import HeldStore, Opener
from tests.fuse.test_upgrade import WORKER, Version
from tests.mounts import ROOT, HealfsMount

BLOCK = b"x" * 4096
GENEROUS = 120.0
AT_ONCE = 60.0  # seconds: what must not wait for anybody, on a busy machine


def _problem(mount: HealfsMount) -> str:
    """What `healfs list` says why no worker serves."""
    (row,) = json.loads(mount.run("list", "--json", timeout=AT_ONCE).stdout)
    assert (row["state"] == "no worker") == ("reason" in row)
    return str(row.get("reason", ""))


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("healfs: ")
    return line


# --- workers that die one after the other -------------------------------------------------------


def test_a_worker_that_dies_again_and_again(
    server: NbdServer,
    healfs_mount: Mounter,
    agent: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mount's own installation is replaced by a broken one, as by a failed update."""
    installed = Version(tmp_path / "installed", "1.0")
    monkeypatch.setenv("PYTHONPATH", str(installed.directory))
    mount = healfs_mount(server.uri())
    monkeypatch.delenv("PYTHONPATH")
    before = mount.status()
    assert before["version"] == "1.0"
    writer = agent(mount.file)
    good = (installed.directory / "healfs" / WORKER).read_text()
    installed.write(WORKER, "raise SystemExit(9)\n")
    log = Path(before["log"])
    killed = time.monotonic()
    os.kill(before["pids"]["worker"], signal.SIGKILL)
    writer.ask("pwrite", 0, BLOCK)
    wait_until(lambda: "no worker runs: 4 in a row ended with status 9" in log.read_text(), "four")
    # Another one may have died since.
    said = r"\d+ in a row ended with status 9 before anything was answered"
    assert re.search(said, _problem(mount))
    # The pauses grow.
    pauses = [float(p) for p in re.findall(r"is started ([0-9.]+) s after", log.read_text())]
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
    # Whoever asks is told at once, in one line.
    for arguments in (("status",), ("policy",), ("reconnect",), ("umount",)):
        done = mount.run(*arguments, str(mount.mountpoint), timeout=AT_ONCE, check=False)
        assert "no worker runs" in _one_line(done) and str(log) in done.stderr
    table = mount.run("list", timeout=AT_ONCE)
    assert "no worker" in table.stdout and "no worker runs" in table.stderr
    # Another version takes over, although there is nobody to take over from.
    server.kill()
    mended = time.monotonic()
    Version(tmp_path / "mended", "1.1").upgrade(mount)
    status = mount.status()
    assert status["version"] == "1.1" and _problem(mount) == ""
    # The outage counts from the death, and the backend, that is away since, makes no new one.
    assert status["outages"]["count"] == 1
    assert status["outages"]["current_seconds"] >= mended - killed
    server.start()
    assert writer.answer().value == 4096
    assert status["worker_restarts"] >= 4
    # The installation is mended, too: nothing more is needed for the next death.
    installed.write(WORKER, good)


def test_umount_force_when_no_worker_comes_up(
    image: Path, tmp_path: Path, commands: Commands
) -> None:
    installed = Version(tmp_path / "installed")
    commands.environment["PYTHONPATH"] = str(installed.directory)
    assert commands.mount(image).returncode == 0
    installed.write(WORKER, "raise SystemExit(9)\n")
    del commands.environment["PYTHONPATH"]
    writer = Agent(commands.file)
    try:
        os.kill(_status(commands)["pids"]["worker"], signal.SIGKILL)
        writer.ask("pwrite", 0, BLOCK)
        wait_until(lambda: "no worker runs: 3" in commands.log(), "three deaths")
        done = commands.run("umount", commands.mountpoint, "--force", seconds=AT_ONCE)
        assert done.returncode == 0 and "no worker runs" in done.stderr
        assert writer.answer().errno in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
    finally:
        writer.kill()
        writer.ended()
    commands.nothing_left(GENEROUS)


def _status(commands: Commands) -> dict[str, dict[str, int]]:
    done = commands.run("status", commands.mountpoint, "--json", seconds=GENEROUS)
    assert done.returncode == 0, done.stderr
    answer: dict[str, dict[str, int]] = json.loads(done.stdout)
    return answer


# --- a worker that cannot be killed: its storage holds it in the kernel -------------------------


def _stuck(commands: Commands, store: HeldStore) -> tuple[Agent, int]:
    """Kill a worker whose fsync the storage does not answer; who asked, and the worker's pid.

    (An io_uring read ends with the process, or after it; an fsync is a kernel thread's.)
    """
    assert commands.mount(store.path).returncode == 0
    caller = Agent(commands.file)
    before = store.held()
    caller.ask("fsync")
    wait_until(lambda: store.held() > before, "the fsync in the store")
    worker = _status(commands)["pids"]["worker"]
    os.kill(worker, signal.SIGKILL)
    return caller, worker


def _still_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_stuck_worker_is_said_and_replaced_when_its_storage_answers(
    commands: Commands, held_store: HeldStore
) -> None:
    caller, worker = _stuck(commands, held_store)
    try:
        wait_until(lambda: f"the worker (pid {worker}) was killed" in commands.log(), "the log")
        assert _still_there(worker)
        line = _one_line(commands.run("status", commands.mountpoint, seconds=AT_ONCE))
        assert f"(pid {worker}) was killed and cannot end" in line and "umount --force" in line
        line = _one_line(commands.run("umount", commands.mountpoint, seconds=AT_ONCE))
        assert "cannot end" in line and commands.is_mounted
        held_store.release()
        assert not caller.answer().errno
        assert _status(commands)["pids"]["worker"] != worker
    finally:
        caller.kill()
        caller.ended()
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left(GENEROUS)


def test_umount_force_with_a_stuck_worker_aborts_the_connection(
    commands: Commands, held_store: HeldStore
) -> None:
    caller, worker = _stuck(commands, held_store)
    try:
        line = commands.run("umount", commands.mountpoint, "--force", seconds=GENEROUS)
        assert line.returncode == 1
        assert f"unmounted, but the worker (pid {worker}) was killed and cannot end" in line.stderr
        assert not commands.is_mounted and commands.processes() == [worker]
        assert caller.answer().errno in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
    finally:
        caller.kill()
        caller.ended()
        held_store.abort()
    commands.nothing_left(GENEROUS)


@pytest.mark.soak
def test_an_upgrade_of_a_worker_that_cannot_end_is_given_up(
    held_store: HeldStore, healfs_mount: Mounter, agent: Opener, tmp_path: Path
) -> None:
    """It is told to make room, then killed, and is still there."""
    mount = healfs_mount(held_store.path)
    before = mount.status()
    caller = agent(mount.file)
    held = held_store.held()
    caller.ask("fsync")
    wait_until(lambda: held_store.held() > held, "the fsync in the store")
    upgrading = Version(tmp_path / "version").start_upgrade(mount)
    _, wrong = upgrading.communicate(timeout=240)
    assert upgrading.returncode == 1 and "the old worker was killed and cannot end" in wrong
    assert mount.processes().count(before["pids"]["worker"]) == 1
    held_store.release()
    assert not caller.answer().errno
    assert mount.status()["version"] == before["version"]


def test_sigterm_with_a_stuck_worker_ends_the_keeper(
    commands: Commands, held_store: HeldStore
) -> None:
    caller, worker = _stuck(commands, held_store)
    try:
        (keeper,) = set(commands.processes()) - {worker}
        os.kill(keeper, signal.SIGTERM)
        wait_until(lambda: commands.processes() == [worker], "the keeper's end", GENEROUS)
        assert not commands.is_mounted and commands.run_files() == []
        assert f"the worker (pid {worker}) was killed and cannot end: it is left" in commands.log()
        assert caller.answer().errno in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
    finally:
        caller.kill()
        caller.ended()
        held_store.abort()
    commands.nothing_left(GENEROUS)


@pytest.mark.parametrize("where", ["moved", "bound"])
def test_sigterm_with_a_stuck_worker_of_a_mount_that_is_elsewhere(
    commands: Commands, held_store: HeldStore, where: str
) -> None:
    """Who waits is answered wherever the disk is mounted."""
    caller, worker = _stuck(commands, held_store)
    elsewhere = commands.directory / "elsewhere"
    elsewhere.mkdir()
    move = ["mount", "--move" if where == "moved" else "--bind", commands.mountpoint, elsewhere]
    try:
        if subprocess.run(move, capture_output=True, timeout=GENEROUS).returncode:
            pytest.skip("mounts cannot be moved here")
        if where == "bound":
            subprocess.run(["umount", "-l", commands.mountpoint], check=True, timeout=GENEROUS)
        (keeper,) = set(commands.processes()) - {worker}
        os.kill(keeper, signal.SIGTERM)
        wait_until(lambda: commands.processes() == [worker], "the keeper's end", GENEROUS)
        assert caller.answer().errno in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
    finally:
        held_store.abort()
        caller.kill()
        caller.ended()
        subprocess.run(["umount", "-l", elsewhere], capture_output=True, timeout=GENEROUS)
    commands.nothing_left(GENEROUS)


# --- kernels before 6.9 -------------------------------------------------------------------------

NOT_SURVIVED = "this kernel is older than 6.9: the death of the worker is not survived"


@pytest.fixture
def old_kernel(commands: Commands) -> Commands:
    commands.environment["PYTHONPATH"] = str(ROOT / "tests/fuse/old_kernel")
    return commands


def test_mount_on_an_old_kernel_says_that_the_death_is_not_survived(
    old_kernel: Commands, image: Path
) -> None:
    done = old_kernel.mount(image)
    assert (done.returncode, done.stderr) == (0, f"healfs: {NOT_SURVIVED}\n")
    assert NOT_SURVIVED in _status(old_kernel)["notes"]
    line = _one_line(old_kernel.run("upgrade", old_kernel.mountpoint))
    assert "this kernel is older than 6.9" in line
    assert old_kernel.run("umount", old_kernel.mountpoint).returncode == 0


def test_the_death_on_an_old_kernel_ends_the_mount(old_kernel: Commands, image: Path) -> None:
    keeper = old_kernel.start("mount", image, old_kernel.mountpoint, "--foreground")
    assert keeper.stdout is not None and keeper.stdout.readline() == f"{old_kernel.file}\n"
    reader = Agent(old_kernel.file)
    try:
        os.kill(_status(old_kernel)["pids"]["worker"], signal.SIGKILL)
        _, said = keeper.communicate(timeout=GENEROUS)
        assert keeper.returncode == 1
        assert f"ended with signal 9: {old_kernel.mountpoint} is taken away" in said
        answer = reader.do("pread", 0, 512)
        assert answer.errno in (errno.ECONNABORTED, errno.ENOTCONN), answer
    finally:
        reader.kill()
        reader.ended()
    old_kernel.nothing_left(GENEROUS)
