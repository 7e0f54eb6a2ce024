"""Every way in which a mount ends: bounded, nothing given up silently, nothing left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from healfs.control.client import connect
from healfs.daemon.worker import Worker
from healfs.fuse.mount import is_mounted, mountinfo
from tests.backends.nbd_servers import NbdServer, nbdkit, wait_until
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.control import ANSWER, Control

BLOCK = b"x" * 4096
GENEROUS = 120.0
# What is promised to end within 5 s takes little more than 2 (measured); so long it may take where
# others have the machine, too.
AT_ONCE = 30.0


def _mounted(commands: Commands, source: str | Path, *options: str) -> None:
    done = commands.mount(source, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{commands.file}\n"


def _status(commands: Commands) -> dict[str, object]:
    done = commands.run("status", commands.mountpoint, "--json", seconds=ANSWER)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.fixture
def away(commands: Commands, server: NbdServer) -> Iterator[tuple[Commands, NbdServer, Agent]]:
    """A mount in an outage, with one write parked."""
    _mounted(commands, server.uri())
    writer = Agent(commands.file)
    try:
        server.kill()
        writer.ask("pwrite", 0, BLOCK)
        _until_parked(commands, 1)
        yield commands, server, writer
    finally:
        writer.kill()
        writer.ended()


@pytest.fixture
def hanging(commands: Commands, server: NbdServer) -> Iterator[tuple[Commands, Agent]]:
    """A server that answers nothing, with a write in flight, and one answered and not flushed."""
    _mounted(commands, server.uri())
    writer = Agent(commands.file)
    try:
        assert writer.ok("pwrite", 4096, BLOCK) == 4096
        server.pause()
        writer.ask("pwrite", 0, BLOCK)
        with connect(str(_status(commands)["control"]), ANSWER) as client:
            Control(client).until(lambda status: status["requests"]["in_flight"] == 1)
        yield commands, writer
    finally:
        writer.kill()
        writer.ended()


def _until_parked(commands: Commands, count: int) -> None:
    with connect(str(_status(commands)["control"]), ANSWER) as client:
        Control(client).parked(count)


def _pids(commands: Commands) -> dict[str, int]:
    return _status(commands)["pids"]  # type: ignore[return-value]


def test_umount_leaves_nothing(commands: Commands, image: Path) -> None:
    _mounted(commands, image)
    assert commands.is_mounted and len(commands.processes()) == 2
    done = commands.run("umount", commands.mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    commands.nothing_left()
    # The locks, too: QEMU may have the image now.
    qemu_io = ["qemu-io", "-f", "raw", "-c", "write -P 7 0 512", str(image)]
    subprocess.run(qemu_io, check=True, capture_output=True, timeout=GENEROUS)
    _mounted(commands, image)
    assert commands.run("umount", commands.mountpoint).returncode == 0


def test_umount_flushes_what_was_answered(commands: Commands, server: NbdServer) -> None:
    _mounted(commands, server.uri())
    writer = Agent(commands.file)
    assert writer.ok("pwrite", 0, BLOCK) == 4096
    writer.kill()
    writer.ended()
    assert commands.run("umount", commands.mountpoint).returncode == 0
    assert "unmounted" in commands.log()
    commands.nothing_left()


def test_umount_in_an_outage_says_what_waits_and_leaves_the_mount(
    away: tuple[Commands, NbdServer, Agent],
) -> None:
    commands, server, writer = away
    before = time.monotonic()
    done = commands.run("umount", commands.mountpoint)
    took = time.monotonic() - before
    assert done.returncode == 1 and took < AT_ONCE  # it tries for 5 s
    (line,) = done.stderr.splitlines()
    assert line.count(str(commands.mountpoint)) == 1
    assert "1 request waits" in line and "--force" in line and "the backend is away (" in line
    assert commands.is_mounted and len(commands.processes()) == 2 and not writer.answered
    # The flush that it gave up was no guest's.
    assert commands.status()["totals"]["flush"] == {"requests": 0, "bytes": 0, "errors": 0}
    server.start()
    assert writer.answer().value == 4096
    assert writer.ok("pread", 0, 4096) == BLOCK


def test_umount_waits_for_a_backend_that_returns(away: tuple[Commands, NbdServer, Agent]) -> None:
    commands, server, writer = away
    with connect(str(_status(commands)["control"]), ANSWER) as client:
        ending = commands.start("umount", commands.mountpoint)
        Control(client).parked(2)  # its flush waits, too, for five seconds
        server.start()
    assert writer.answer().value == 4096
    writer.kill()
    writer.ended()
    _, said = ending.communicate(timeout=GENEROUS)
    if ending.returncode:  # it was quicker than the end of the process that has the file open
        assert "in use" in said
        assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left()


def test_force_answers_what_is_parked_and_says_so(away: tuple[Commands, NbdServer, Agent]) -> None:
    commands, _, writer = away
    before = time.monotonic()
    done = commands.run("umount", commands.mountpoint, "--force")
    took = time.monotonic() - before
    assert done.returncode == 0 and took < AT_ONCE
    (line,) = done.stderr.splitlines()
    assert "given up" in line and "1 write (4 KiB)" in line
    assert writer.answer().errno == errno.EIO
    commands.nothing_left()
    said = commands.run("events", commands.mountpoint, "--json").stdout.splitlines()
    last = json.loads(said[-1])
    assert last["event"] == "HEALFS_UNMOUNTED" and last["data"]["uid"] == os.geteuid()
    assert last["data"]["given_up"]["write"] == {"requests": 1, "bytes": 4096}
    assert last["data"]["outage_seconds"] > 0


def test_force_when_the_server_hangs(hanging: tuple[Commands, Agent]) -> None:
    commands, writer = hanging
    before = time.monotonic()
    done = commands.run("umount", commands.mountpoint, "--force")
    assert time.monotonic() - before < AT_ONCE
    assert done.returncode == 0 and "1 write (4 KiB)" in done.stderr
    assert writer.answer().errno == errno.EIO
    commands.nothing_left()


def test_in_use_names_a_loop_device(commands: Commands, image: Path) -> None:
    """It has no process."""
    _mounted(commands, image)
    attach = ["losetup", "--find", "--show", commands.file]
    made = subprocess.run(attach, capture_output=True, text=True, timeout=GENEROUS, check=False)
    if made.returncode:
        pytest.skip(f"no loop device is to be had: {made.stderr}")
    device = made.stdout.strip()
    try:
        done = commands.run("umount", commands.mountpoint)
    finally:
        subprocess.run(["losetup", "--detach", device], timeout=GENEROUS, check=True)
    assert done.returncode == 1 and f"in use by {device} (losetup -d {device})" in done.stderr


def test_in_use_says_by_whom(commands: Commands, image: Path) -> None:
    _mounted(commands, image)
    holder = Agent(commands.file)
    done = commands.run("umount", commands.mountpoint)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "in use" in line and f"(pid {holder.process.pid})" in line
    assert holder.ok("pwrite", 0, BLOCK) == 4096  # the mount is as it was
    # Forced, it goes; who has the file open gets errors from then on.
    assert commands.run("umount", commands.mountpoint, "--force").returncode == 0
    assert holder.do("pread", 0, 512).errno in (errno.ENOTCONN, errno.ECONNABORTED)
    commands.nothing_left()
    holder.kill()
    holder.ended()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_keeper_ends_it_orderly(commands: Commands, image: Path, name: str) -> None:
    _mounted(commands, image)
    os.kill(_pids(commands)["keeper"], signal.Signals[name])
    commands.nothing_left(GENEROUS)
    assert "Traceback" not in commands.log()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_an_outage_ends_it_and_logs_what_it_gave_up(
    away: tuple[Commands, NbdServer, Agent], name: str
) -> None:
    commands, server, writer = away
    keeper = _pids(commands)["keeper"]
    before = time.monotonic()
    os.kill(keeper, signal.Signals[name])
    commands.nothing_left(GENEROUS)
    assert time.monotonic() - before < AT_ONCE
    assert writer.answer().errno == errno.EIO
    assert "given up" in commands.log() and "Traceback" not in commands.log()
    # The lock of the export, too: another mount may have it now.
    server.start()
    _mounted(commands, server.uri())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_the_server_hangs_ends_it(
    hanging: tuple[Commands, Agent], name: str
) -> None:
    commands, writer = hanging
    keeper = _pids(commands)["keeper"]
    before = time.monotonic()
    os.kill(keeper, signal.Signals[name])
    commands.nothing_left(GENEROUS)
    assert time.monotonic() - before < AT_ONCE
    assert writer.answer().errno == errno.EIO
    assert "answered and not flushed: bytes 4096-8191\n" in commands.log()


# --- the keeper alone is killed -----------------------------------------------------------------


@pytest.fixture
def orphan(commands: Commands, server: NbdServer) -> Iterator[tuple[Commands, NbdServer, int]]:
    """A worker without a keeper, with an answered write that is not flushed; and its pid."""
    _mounted(commands, server.uri())
    pids = _pids(commands)
    os.kill(pids["keeper"], signal.SIGKILL)
    wait_until(lambda: _pids(commands)["keeper"] == 0, "the worker to see it")
    assert "the keeper is gone" in " ".join(_status(commands)["notes"])  # type: ignore[call-overload]
    writer = Agent(commands.file)
    try:
        assert writer.ok("pwrite", 0, BLOCK) == 4096  # it goes on
    finally:
        writer.kill()
        writer.ended()
    yield commands, server, pids["worker"]


def test_umount_without_a_keeper(orphan: tuple[Commands, NbdServer, int], image: Path) -> None:
    commands, _, _ = orphan
    done = commands.run("umount", commands.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    commands.nothing_left()
    assert image.read_bytes()[:4096] == BLOCK


def test_umount_8_without_a_keeper(orphan: tuple[Commands, NbdServer, int]) -> None:
    commands, _, _ = orphan
    subprocess.run(["umount", commands.mountpoint], check=True, timeout=GENEROUS)
    commands.nothing_left(GENEROUS)


def test_a_worker_without_a_keeper_that_flushes_still_is_a_daemon(
    orphan: tuple[Commands, NbdServer, int], tmp_path: Path
) -> None:
    """No other takes its place, and its record, until it has ended."""
    commands, server, worker = orphan
    server.kill()
    subprocess.run(["umount", commands.mountpoint], check=True, timeout=GENEROUS)
    (tmp_path / "new.img").write_bytes(bytes(1 << 20))
    done = commands.mount(tmp_path / "new.img")
    if worker in commands.processes():
        assert done.returncode == 1 and "a healfs daemon serves it already" in done.stderr
        commands.nothing_left(GENEROUS)
    assert "answered and not flushed: bytes 0-4095\n" in commands.log()


def test_a_worker_without_a_keeper_takes_no_new_mount_away(commands: Commands, image: Path) -> None:
    """Another keeper has come between its last answer on the control socket and its end."""
    _mounted(commands, image)
    directory = os.path.dirname(str(_status(commands)["control"]))
    worker = SimpleNamespace(
        config=SimpleNamespace(mountpoint=str(commands.mountpoint)),
        parent=SimpleNamespace(greeting={"directory": directory}),
        channel=None,
        lock=-1,
    )
    worker._take_away = partial(Worker._take_away, cast(Worker, worker))
    Worker._clear_up(cast(Worker, worker))
    assert commands.is_mounted
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left(GENEROUS)


def test_without_a_keeper_the_signal_is_the_workers(
    orphan: tuple[Commands, NbdServer, int],
) -> None:
    """So systemd ends it in order, by the unit's KillMode=control-group."""
    commands, server, worker = orphan
    server.kill()
    wait_until(lambda: _status(commands)["state"] == "stalled", "the outage")
    os.kill(worker, signal.SIGTERM)
    commands.nothing_left(GENEROUS)
    assert "answered and not flushed: bytes 0-4095\n" in commands.log()


def test_the_watchdogs_sigabrt_ends_a_keeper_and_not_the_worker_beside_it(
    commands: Commands, image: Path
) -> None:
    """systemd sends it to both: the worker flushes and unmounts, once the keeper is gone."""
    _mounted(commands, image)
    pids = _pids(commands)
    os.kill(pids["worker"], signal.SIGABRT)
    os.kill(pids["keeper"], signal.SIGABRT)
    commands.nothing_left(GENEROUS)
    assert commands.log().count("asked to end") == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_signal_that_goes_to_both_ends_it_once(
    commands: Commands, image: Path, name: str
) -> None:
    """systemd's SIGTERM, a terminal's Ctrl-C."""
    _mounted(commands, image)
    pids = _pids(commands)
    os.kill(pids["worker"], signal.Signals[name])
    os.kill(pids["keeper"], signal.Signals[name])
    commands.nothing_left(GENEROUS)
    assert commands.log().count("asked to end") == 1 and "given up" not in commands.log()


def test_umount_8_from_outside_ends_the_daemon(commands: Commands, image: Path) -> None:
    _mounted(commands, image)
    subprocess.run(["umount", commands.mountpoint], check=True, timeout=GENEROUS)
    commands.nothing_left(GENEROUS)


def test_umount_clears_what_a_killed_daemon_left(commands: Commands, image: Path) -> None:
    _mounted(commands, image)
    pids = _pids(commands)
    os.kill(pids["keeper"], signal.SIGKILL)
    os.kill(pids["worker"], signal.SIGKILL)
    wait_until(lambda: not commands.processes(), "the end of both")
    done = commands.run("umount", commands.mountpoint)
    assert done.returncode == 0
    said = f"{commands.mountpoint}: the daemon was gone already; cleared what it left; nothing is"
    assert said in done.stderr
    commands.nothing_left()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_foreground_ends_with_a_signal(commands: Commands, image: Path, name: str) -> None:
    staying = commands.start("mount", image, commands.mountpoint, "--foreground")
    assert staying.stdout is not None
    assert staying.stdout.readline() == f"{commands.file}\n"
    assert _status(commands)["state"] == "ready"
    staying.send_signal(signal.Signals[name])
    _, said = staying.communicate(timeout=GENEROUS)
    assert staying.returncode == 0, said
    commands.nothing_left()


def test_foreground_ends_with_umount(commands: Commands, image: Path) -> None:
    staying = commands.start("mount", image, commands.mountpoint, "--foreground")
    assert staying.stdout is not None
    assert staying.stdout.readline() == f"{commands.file}\n"
    assert commands.run("umount", commands.mountpoint).returncode == 0
    staying.communicate(timeout=GENEROUS)
    assert staying.returncode == 0


# --- a server that is not there yet -------------------------------------------------------------


def test_no_wait_mounts_while_the_server_is_away(commands: Commands, image: Path) -> None:
    absent = nbdkit("file", str(image))
    try:
        _mounted(commands, absent.uri(), "--no-wait", "--size", "16M")
        status = _status(commands)
        assert status["state"] == "connecting" and status["size"] == 16 << 20
        one = Agent(commands.file)
        one.ask("pwrite", 0, BLOCK)
        _until_parked(commands, 1)
        assert not one.answered and _status(commands)["state"] == "connecting"
        absent.start()
        assert one.answer().value == 4096
        assert _status(commands)["state"] == "ready"
        assert _status(commands)["outages"]["count"] == 0  # type: ignore[index]
        one.kill()
        one.ended()
        assert commands.run("umount", commands.mountpoint).returncode == 0
        commands.nothing_left()
        assert image.read_bytes()[:4096] == BLOCK
    finally:
        absent.close()


def test_no_wait_umounts_before_the_server_came(commands: Commands, tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path / 'never'}"
    _mounted(commands, uri, "--no-wait", "--size", "16M")
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left()


@pytest.mark.parametrize("tcp", [False, True])
def test_mount_waits_for_an_absent_server(commands: Commands, image: Path, tcp: bool) -> None:
    absent = nbdkit("file", str(image), tcp=tcp)
    try:
        mounting = commands.start("mount", absent.uri(), commands.mountpoint)
        assert mounting.stderr is not None
        said = mounting.stderr.readline()
        assert said.startswith("healfs: waiting for") and "Ctrl-C" in said
        assert not commands.is_mounted
        absent.start()
        printed, _ = mounting.communicate(timeout=GENEROUS)
        assert mounting.returncode == 0 and printed == f"{commands.file}\n"
        assert _status(commands)["state"] == "ready"
        assert commands.run("umount", commands.mountpoint).returncode == 0
    finally:
        absent.close()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_ends_a_waiting_mount_with_nothing_left(
    commands: Commands, tmp_path: Path, name: str
) -> None:
    mounting = commands.start(
        "mount", f"nbd+unix:///?socket={tmp_path / 'never'}", commands.mountpoint
    )
    assert mounting.stderr is not None
    assert "waiting for" in mounting.stderr.readline()
    mounting.send_signal(signal.Signals[name])
    _, said = mounting.communicate(timeout=GENEROUS)
    assert mounting.returncode == 130 and said == "healfs: interrupted; nothing is mounted\n"
    commands.nothing_left()


# --- killed processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", [("pread", 0, 512), ("pwrite", 0, BLOCK), ("fsync",)])
def test_a_killed_process_is_let_go(
    commands: Commands, server: NbdServer, call: tuple[object, ...]
) -> None:
    _mounted(commands, server.uri())
    waiting = Agent(commands.file)
    server.kill()
    waiting.ask(*call)  # type: ignore[arg-type]
    _until_parked(commands, 1)
    waiting.kill()
    assert waiting.ended() == -signal.SIGKILL
    assert _status(commands)["state"] == "stalled"
    assert _status(commands)["requests"]["parked"] == 0  # type: ignore[index]


def test_a_process_killed_while_its_request_hangs_in_the_server_is_let_go(
    commands: Commands, server: NbdServer
) -> None:
    """The request was in flight when the outage began: it was not parked when it came."""
    _mounted(commands, server.uri())
    waiting = Agent(commands.file)
    server.pause()
    waiting.ask("pread", 0, 512)
    with connect(str(_status(commands)["control"]), ANSWER) as client:
        Control(client).until(lambda status: status["requests"]["in_flight"] == 1)
    server.kill()
    _until_parked(commands, 1)
    waiting.kill()
    assert waiting.ended() == -signal.SIGKILL


def _load(file: Path, engine: str) -> subprocess.Popen[bytes]:
    common = ["--direct=1", "--invalidate=0", "--fallocate=none", "--allow_file_create=0"]
    return subprocess.Popen(
        [
            *("fio", "--name=load", f"--filename={file}", f"--ioengine={engine}", *common),
            *("--rw=randrw", "--bs=4k", "--size=8M", "--iodepth=32", "--thread"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("engine", ["libaio", "io_uring"])
def test_a_killed_caller_of_asynchronous_requests_is_let_go(
    commands: Commands, server: NbdServer, engine: str
) -> None:
    """No INTERRUPT tells of these."""
    _mounted(commands, server.uri())
    server.kill()
    load = _load(commands.file, engine)
    try:
        _until_parked(commands, 32)
    finally:
        load.kill()
    assert load.wait(GENEROUS) == -signal.SIGKILL
    with connect(str(_status(commands)["control"]), ANSWER) as client:
        Control(client).until(lambda status: status["requests"]["parked"] == 0)
    server.start()
    assert commands.run("umount", commands.mountpoint).returncode == 0


def test_a_killed_dd_is_let_go(commands: Commands, server: NbdServer) -> None:
    _mounted(commands, server.uri())
    server.kill()
    dd = subprocess.Popen(
        ["dd", "if=/dev/zero", f"of={commands.file}", "bs=1M", "conv=notrunc", "status=none"]
    )
    try:
        _until_parked(commands, 1)
    finally:
        dd.kill()
    assert dd.wait(GENEROUS) == -signal.SIGKILL


# --- what is somebody else's --------------------------------------------------------------------


@pytest.fixture
def over(commands: Commands) -> Iterator[Callable[[], None]]:
    """To mount something else at the mountpoint; at the end it must be there still."""
    mounted = False

    def mount() -> None:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "somebody's", commands.mountpoint]
        subprocess.run(command, check=True, timeout=GENEROUS)
        mounted = True

    yield mount
    if mounted:
        kinds = [kind for place, kind, _ in mountinfo() if place == str(commands.mountpoint)]
        assert kinds and kinds[-1] == "tmpfs"
        for _ in kinds:
            subprocess.run(["umount", "-l", commands.mountpoint], check=True, timeout=GENEROUS)


def test_what_is_mounted_over_ours_stays(
    commands: Commands, image: Path, over: Callable[[], None]
) -> None:
    _mounted(commands, image)
    over()
    done = commands.run("umount", commands.mountpoint)
    assert done.returncode == 1
    assert "something else is mounted over it; unmount that first" in done.stderr
    assert _status(commands)["state"] == "ready"
    assert commands.run("umount", "--force", commands.mountpoint).returncode == 0
    wait_until(lambda: not commands.processes() and not commands.run_files(), "the end")
    assert "something else is mounted over it" in commands.log()


def test_what_is_mounted_where_ours_was_stays(
    commands: Commands, image: Path, over: Callable[[], None]
) -> None:
    _mounted(commands, image)
    pids = _pids(commands)
    os.kill(pids["keeper"], signal.SIGKILL)
    os.kill(pids["worker"], signal.SIGKILL)
    wait_until(lambda: not commands.processes(), "the end of both")
    subprocess.run(["umount", commands.mountpoint], check=True, timeout=GENEROUS)
    over()
    done = commands.run("umount", commands.mountpoint)
    assert done.returncode == 0 and "cleared what it left" in done.stderr
    assert not commands.run_files()


@pytest.mark.parametrize("options", [[], ["--force"]])
@pytest.mark.parametrize("keeper", [True, False])
def test_ours_is_unmounted_where_it_was_moved_to(
    commands: Commands, image: Path, options: list[str], keeper: bool
) -> None:
    _mounted(commands, image)
    elsewhere = commands.directory / "elsewhere"
    elsewhere.mkdir()
    move = ["mount", "--move", commands.mountpoint, elsewhere]
    moved = subprocess.run(move, capture_output=True, text=True, timeout=GENEROUS)
    if moved.returncode:
        pytest.skip(f"mounts cannot be moved here: {moved.stderr}")
    try:
        if not keeper:
            os.kill(_pids(commands)["keeper"], signal.SIGKILL)
            wait_until(lambda: not _pids(commands)["keeper"], "the keeper's end")
        done = commands.run("umount", commands.mountpoint, *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert not is_mounted(str(elsewhere))
    finally:
        if is_mounted(str(elsewhere)):
            subprocess.run(["umount", "-l", elsewhere], check=True, timeout=GENEROUS)
    commands.nothing_left(GENEROUS)


def test_a_process_that_has_the_pid_of_one_that_is_gone_is_not_killed(
    commands: Commands, image: Path
) -> None:
    _mounted(commands, image)
    pids = _pids(commands)
    (record,) = commands.runtime.glob("*/mount.json")
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            for name in "keeper", "worker":
                os.kill(pids[name], signal.SIGSTOP)
            text = record.read_text().replace(f": {pids['worker']}", f": {stranger.pid}")
            assert str(stranger.pid) in text
            record.write_text(text)
            assert commands.run("umount", "--force", commands.mountpoint).returncode == 0
            assert stranger.poll() is None
        finally:
            stranger.kill()
            os.kill(pids["worker"], signal.SIGKILL)
    commands.nothing_left(GENEROUS)


def test_force_without_a_keeper_while_the_file_is_open(
    orphan: tuple[Commands, NbdServer, int],
) -> None:
    commands, _, _ = orphan
    holder = Agent(commands.file)
    try:
        assert commands.run("umount", "--force", commands.mountpoint).returncode == 0
        commands.nothing_left(GENEROUS)
    finally:
        holder.kill()
        holder.ended()


def test_what_is_written_between_the_flush_and_the_unmount_is_told(
    commands: Commands, server: NbdServer
) -> None:
    _mounted(commands, server.uri())
    pids = _pids(commands)
    os.kill(pids["keeper"], signal.SIGSTOP)
    try:
        ending = commands.start("umount", commands.mountpoint)
        for _ in range(2):  # once more: then it waits for the keeper
            wait_until(lambda: _used(commands) == 2, "the umount to have come")
        late = Agent(commands.file)
        assert late.ok("pwrite", 0, BLOCK) == 4096
        server.pause()
        late.kill()
        late.ended()
    finally:
        os.kill(pids["keeper"], signal.SIGCONT)
    _, said = ending.communicate(timeout=GENEROUS)
    assert ending.returncode == 0
    assert "given up, answered but not flushed: 1 (4 KiB), bytes 0-4095" in said
    commands.nothing_left(GENEROUS)


def _used(commands: Commands) -> int:
    limits: Any = _status(commands)["limits"]
    return int(limits["control_connections"]["used"])


# --- used elsewhere -----------------------------------------------------------------------------


@pytest.fixture
def bound(commands: Commands, server: NbdServer) -> Iterator[Path]:
    """The disk is mounted, and a bind mount of it is in another mount namespace: a container."""
    _mounted(commands, server.uri())
    where = f"{commands.directory}/elsewhere"
    os.mkdir(where)
    script = f"mount --make-rprivate / && mount --bind {commands.mountpoint} {where} && echo && cat"
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"\n":
            pytest.skip("no mount namespace of our own")
        yield Path(f"/proc/{holder.pid}/root{where}/disk.img")
    finally:
        holder.kill()
        holder.communicate(timeout=GENEROUS)


def test_who_has_it_open_in_another_namespace_goes_on(commands: Commands, bound: Path) -> None:
    user = Agent(bound)
    assert user.ok("pwrite", 0, BLOCK) == 4096
    os.kill(_pids(commands)["worker"], signal.SIGKILL)
    assert user.ok("pwrite", 0, BLOCK) == 4096  # the successor knows who is there
    done = commands.run("umount", commands.mountpoint)
    assert done.returncode == 1 and "its file is open elsewhere" in done.stderr
    assert not commands.is_mounted and user.ok("pwrite", 4096, BLOCK) == 4096
    done = commands.run("umount", commands.mountpoint)
    assert done.returncode == 1 and "ends when nobody uses it elsewhere" in done.stderr
    assert user.ok("pread", 4096, 4096) == BLOCK
    done = commands.run("umount", "--force", commands.mountpoint)
    assert done.returncode == 0
    user.kill()
    user.ended()
    commands.nothing_left(GENEROUS)


def test_who_goes_on_elsewhere_without_a_keeper_is_a_daemon_still(
    commands: Commands, bound: Path, tmp_path: Path
) -> None:
    user = Agent(bound)
    try:
        pids = _pids(commands)
        assert commands.run("umount", commands.mountpoint).returncode == 1
        os.kill(pids["keeper"], signal.SIGKILL)
        wait_until(lambda: _pids(commands)["keeper"] == 0, "the worker to see it")
        (tmp_path / "new.img").write_bytes(bytes(1 << 20))
        done = commands.mount(tmp_path / "new.img")
        assert done.returncode == 1 and "a healfs daemon serves it already" in done.stderr
        assert user.ok("pread", 0, 4096) and _pids(commands)["worker"] == pids["worker"]
        os.kill(pids["worker"], signal.SIGTERM)
        wait_until(lambda: not commands.processes(), "its end", GENEROUS)
    finally:
        user.kill()
        user.ended()
    _mounted(commands, tmp_path / "new.img")
    assert commands.run("umount", commands.mountpoint).returncode == 0
    commands.nothing_left(GENEROUS)


def test_a_copy_in_another_namespace_that_nobody_uses_keeps_nothing(
    commands: Commands, bound: Path
) -> None:
    user = Agent(bound)
    user.kill()
    user.ended()
    done = commands.run("umount", commands.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    commands.nothing_left(GENEROUS)


def test_the_daemon_ends_when_it_is_used_nowhere_any_more(
    commands: Commands, image: Path, tmp_path: Path
) -> None:
    _mounted(commands, image)
    where = tmp_path / "bound"
    where.mkdir()
    subprocess.run(["mount", "--bind", commands.mountpoint, where], check=True, timeout=GENEROUS)
    try:
        user = Agent(where / "disk.img")
        assert commands.run("umount", commands.mountpoint).returncode == 1
        done = commands.run("umount", commands.mountpoint)
        assert done.returncode == 1 and f"(pid {user.process.pid})" in done.stderr
        user.kill()
        user.ended()
        subprocess.run(["umount", where], check=True, timeout=GENEROUS)
    finally:
        subprocess.run(["umount", "-l", where], capture_output=True, timeout=GENEROUS)
    commands.nothing_left(GENEROUS)


def test_a_hung_worker_of_a_moved_mount_leaves_none(commands: Commands, image: Path) -> None:
    _mounted(commands, image)
    pids = _pids(commands)
    elsewhere = commands.directory / "elsewhere"
    elsewhere.mkdir()
    move = ["mount", "--move", commands.mountpoint, elsewhere]
    if subprocess.run(move, capture_output=True, timeout=GENEROUS).returncode:
        pytest.skip("mounts cannot be moved here")
    try:
        os.kill(pids["worker"], signal.SIGSTOP)
        os.kill(pids["keeper"], signal.SIGTERM)
        wait_until(lambda: not commands.processes(), "the end of all", GENEROUS)
        assert not is_mounted(str(elsewhere))
    finally:
        subprocess.run(["umount", "-l", elsewhere], capture_output=True, timeout=GENEROUS)
    commands.nothing_left(GENEROUS)
