"""What was answered and is not on stable storage: seen, moved out of the way, named at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from healfs.control import unflushed as account
from tests.backends.nbd_servers import NbdServer, nbdkit, wait_until
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import Opener, Rules
from tests.fuse.control import ANSWER, control
from tests.mounts import Status

BLOCK = b"x" * 4096
GENEROUS = 120.0
MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[NbdServer]:
    """A server that has forgotten everything when it comes back."""
    with nbdkit("memory", "64M") as running:
        yield running


def test_seek_calls_bytes_that_only_the_log_has_no_hole(
    healfs_mount: Mounter, agent: Opener, memory: NbdServer, fault: Rules, tmp_path: Path
) -> None:
    mount = healfs_mount(memory.uri(), "--fault", str(tmp_path / "faults.toml"))
    one = agent(mount.file)
    assert one.ok("pwrite", MIB, BLOCK) == 4096
    with control(mount) as disk:
        memory.kill()
        disk.state("stalled")
        fault(f'[[rule]]\nkinds = ["WRITE"]\noffset = {MIB}\nlength = 4096\nerrno = "EIO"\n')
        memory.start()  # the rules are looked at before each connection
        disk.state("ready")
        assert one.ok("pread", MIB, 4096) == BLOCK
        for offset in (0, MIB, 2 * MIB):
            assert one.ok("lseek", offset, os.SEEK_DATA) == offset
            assert one.ok("lseek", offset, os.SEEK_HOLE) == 64 * MIB
        fault("")
        assert not one.do("fsync").errno
        assert one.ok("lseek", 0, os.SEEK_DATA) > 0  # the backend is asked again


def test_a_write_that_never_lands_stops_no_other(
    healfs_mount: Mounter, agent: Opener, image: Path, fault: Rules, tmp_path: Path
) -> None:
    fault('[[rule]]\nkinds = ["WRITE"]\nlength = 4096\nerrno = "ENOSPC"\n')
    rules = str(tmp_path / "faults.toml")
    mount = healfs_mount(image, "--fault", rules, "--log-size", "8M")
    bad, good = agent(mount.file), agent(mount.file)
    bad.ask("pwrite", 0, b"b" * 4096)
    with control(mount) as disk:
        disk.until(lambda status: status["totals"]["retries"] >= 1)
        for number in range(24):  # three times what the log has room for
            assert good.ok("pwrite", (1 + number % 12) * MIB, bytes([number]) * MIB) == MIB
        assert not bad.answered
        fault("")
        assert bad.answer().value == 4096
    assert good.ok("pread", 0, 4096) == b"b" * 4096
    assert good.ok("pread", 12 * MIB, MIB) == bytes([23]) * MIB


# --- the end of a mount with answered writes that are nowhere else ------------------------------


@pytest.fixture
def unflushed(commands: Commands, memory: NbdServer) -> Commands:
    """Two answered writes, nobody has the file open, and the backend is away."""
    done = commands.mount(memory.uri())
    assert done.returncode == 0, done.stderr
    writer = Agent(commands.file)
    try:
        for offset in (0, 8192):
            assert writer.ok("pwrite", offset, BLOCK) == 4096
    finally:
        writer.kill()
        writer.ended()
    memory.kill()
    wait_until(lambda: _status(commands)["state"] == "stalled", "the outage")
    assert _status(commands)["requests"] == {"in_flight": 0, "parked": 0, "unsettled": 0}
    return commands


def _status(commands: Commands) -> Status:
    done = commands.run("status", commands.mountpoint, "--json", seconds=ANSWER)
    assert done.returncode == 0, done.stderr
    answer: Status = json.loads(done.stdout)
    return answer


GIVEN_UP = {"unflushed": {"requests": 2, "bytes": 8192}}
BYTES = "answered and not flushed: bytes 0-4095, 8192-12287\n"


def _logged(commands: Commands, before: str) -> list[object]:
    """What the log says in JSON behind these words."""
    lines = commands.log().splitlines()
    return [json.loads(line.partition(before)[2]) for line in lines if before in line]


def test_umount_names_them_and_force_says_that_they_were_given_up(unflushed: Commands) -> None:
    done = unflushed.run("umount", unflushed.mountpoint)
    assert done.returncode == 1 and unflushed.is_mounted
    assert "2 answered writes are not flushed" in done.stderr and "--force" in done.stderr
    done = unflushed.run("umount", unflushed.mountpoint, "--force")
    assert done.returncode == 0
    said = "given up, answered but not flushed: 2 (8 KiB), bytes 0-4095, 8192-12287\n"
    assert done.stderr.endswith(said)
    unflushed.nothing_left(GENEROUS)
    (given_up,) = _logged(unflushed, "given up: ")
    assert isinstance(given_up, dict) and given_up.items() >= GIVEN_UP.items()
    assert BYTES in unflushed.log()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_logs_them(unflushed: Commands, name: str) -> None:
    os.kill(_status(unflushed)["pids"]["keeper"], signal.Signals[name])
    unflushed.nothing_left(GENEROUS)
    (given_up,) = _logged(unflushed, "given up: ")
    assert isinstance(given_up, dict) and given_up.items() >= GIVEN_UP.items()
    assert BYTES in unflushed.log()


def test_umount_8_from_outside_logs_them(unflushed: Commands) -> None:
    subprocess.run(["umount", unflushed.mountpoint], check=True, timeout=GENEROUS)
    unflushed.nothing_left(GENEROUS)
    assert _logged(unflushed, "lost: ") == [GIVEN_UP]
    assert BYTES in unflushed.log()


def _kill_both(commands: Commands) -> None:
    pids = _status(commands)["pids"]
    os.kill(pids["keeper"], signal.SIGKILL)
    os.kill(pids["worker"], signal.SIGKILL)
    wait_until(lambda: not commands.processes(), "the end of both")


LOST = "at most 2 requests (8192 bytes) that were answered and not flushed are lost"


def test_umount_says_what_went_with_a_killed_daemon(unflushed: Commands) -> None:
    # Not too large for longer than a beat.
    wait_until(lambda: _account(unflushed) == (2, 8192), "the account")
    _kill_both(unflushed)
    done = unflushed.run("umount", unflushed.mountpoint)
    assert done.returncode == 0 and done.stderr.endswith(f"cleared what it left; {LOST}\n")
    unflushed.nothing_left()


def test_a_worker_that_hangs_at_the_end_is_killed_and_its_loss_is_said(
    unflushed: Commands,
) -> None:
    wait_until(lambda: _account(unflushed) == (2, 8192), "the account")
    pids = _status(unflushed)["pids"]
    os.kill(pids["worker"], signal.SIGSTOP)
    os.kill(pids["keeper"], signal.SIGTERM)
    unflushed.nothing_left(GENEROUS)
    assert "did not end in time" in unflushed.log() and LOST in unflushed.log()


def test_a_write_counts_from_before_its_answer(commands: Commands, memory: NbdServer) -> None:
    """Not only with the next beat: killed at once."""
    assert commands.mount(memory.uri()).returncode == 0
    pids = _status(commands)["pids"]
    writer = Agent(commands.file)
    try:
        assert writer.ok("pwrite", 0, BLOCK) == 4096
        os.kill(pids["keeper"], signal.SIGKILL)
        os.kill(pids["worker"], signal.SIGKILL)
        wait_until(lambda: not commands.processes(), "the end of both")
        assert "requests (4096 bytes) that" in commands.run("umount", commands.mountpoint).stderr
    finally:
        writer.kill()
        writer.ended()
    commands.nothing_left()


def test_mount_clears_what_a_killed_daemon_left_and_says_so(
    unflushed: Commands, memory: NbdServer
) -> None:
    wait_until(lambda: _account(unflushed) == (2, 8192), "the account")
    _kill_both(unflushed)
    assert unflushed.is_mounted
    memory.start()
    done = unflushed.mount(memory.uri())
    assert done.returncode == 0 and done.stdout == f"{unflushed.file}\n"
    assert done.stderr.splitlines()[0].endswith(LOST)
    assert _status(unflushed)["state"] == "ready"
    assert unflushed.run("umount", unflushed.mountpoint).returncode == 0
    unflushed.nothing_left()


def test_nothing_is_given_up_when_all_was_flushed(commands: Commands, memory: NbdServer) -> None:
    assert commands.mount(memory.uri()).returncode == 0
    writer = Agent(commands.file)
    try:
        assert writer.ok("pwrite", 0, BLOCK) == 4096
        assert not writer.do("fsync").errno
    finally:
        writer.kill()
        writer.ended()
    memory.kill()
    wait_until(lambda: _status(commands)["state"] == "stalled", "the outage")
    done = commands.run("umount", commands.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    commands.nothing_left(GENEROUS)
    assert not _logged(commands, "given up: ")


def test_nothing_is_lost_with_a_killed_daemon_when_all_was_flushed(
    commands: Commands, memory: NbdServer
) -> None:
    assert commands.mount(memory.uri()).returncode == 0
    writer = Agent(commands.file)
    try:
        assert writer.ok("pwrite", 0, BLOCK) == 4096
        assert not writer.do("fsync").errno
        # What was flushed is taken off the account with the worker's next beat.
        wait_until(lambda: _account(commands) == (0, 0), "the account")
        _kill_both(commands)
        done = commands.run("umount", commands.mountpoint)
        assert "nothing is lost: all that was answered was flushed" in done.stderr
    finally:
        writer.kill()
        writer.ended()
    commands.nothing_left()


def _account(commands: Commands) -> tuple[int, int] | None:
    return account.read(os.path.dirname(_status(commands)["control"]))
