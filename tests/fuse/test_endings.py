"""Whoever waits in an outage and is killed, or exits, goes at once, and the mount can be ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, wait_until
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.caller import WAYS, Caller
from tests.fuse.conftest import Opener
from tests.fuse.control import Control, control
from tests.mounts import HealfsMount

GONE = 60.0  # seconds from its end to be gone: one, where nobody else has the machine
PATIENCE = 120.0
BLOCK = b"e" * 4096
DEPTH = 32
PWRITE64, FSYNC = "18", "74"  # on x86-64

FIO = ("fio", "--name=load", "--direct=1", "--invalidate=0", "--fallocate=none", "--size=8M")
FIO += ("--allow_file_create=0", "--rw=randwrite", "--bs=4k", f"--iodepth={DEPTH}", "--thread")
PROGRAMS = {
    "dd": ("dd", "if=/dev/zero", "bs=1M", "conv=notrunc", "status=none", "of={}"),
    "fio libaio": (*FIO, "--ioengine=libaio", "--filename={}"),
    "fio io_uring": (*FIO, "--ioengine=io_uring", "--filename={}"),
    "qemu": (
        *("qemu-system-x86_64", "-M", "none", "-nodefaults", "-no-user-config", "-S"),
        *("-display", "none", "-monitor", "stdio", "-drive"),
        "if=none,id=disk,file={},format=raw,aio=threads,cache=none",
    ),
}
PARKED = {"dd": 1, "fio libaio": DEPTH, "fio io_uring": DEPTH, "qemu": 1}


@contextmanager
def _running(program: str, file: Path, server: NbdServer, disk: Control) -> Iterator[int]:
    """The pid of a program whose requests are parked: the server is gone by then."""
    command = [word.format(file) for word in PROGRAMS[program]]
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "prlimit", "--core=1", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    try:
        if program == "qemu":  # it wants to look at the disk first
            wait_until(lambda: _has_open(process.pid, file), "QEMU to open the disk", PATIENCE)
        server.kill()
        if program == "qemu":
            process.stdin.write(b'qemu-io disk "aio_write 0 4k"\n')
            process.stdin.flush()
        disk.parked(PARKED[program])
        yield process.pid
        process.wait(GONE)
    finally:
        process.kill()
        process.stdin.close()
        process.wait(PATIENCE)


def _has_open(pid: int, file: Path) -> bool:
    """readlink names the file without touching it."""
    fds = f"/proc/{pid}/fd"
    for fd in os.listdir(fds):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            if os.readlink(f"{fds}/{fd}") == str(file):
                return True
    return False


def _is_gone(pid: int) -> bool:
    return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _ends_in_order(mount: HealfsMount, disk: Control) -> None:
    """Nothing waits, and the mount goes without --force, in the outage."""
    disk.until(lambda status: not any(status["requests"].values()))
    assert disk.status()["state"] == "stalled"
    mount.umount()
    assert not mount.processes()


@pytest.mark.parametrize(
    ("program", "number"),
    [
        *((program, signal.SIGKILL) for program in PROGRAMS),
        ("dd", signal.SIGTERM),
    ],
)
def test_a_killed_program_is_gone(
    server: NbdServer, healfs_mount: Mounter, program: str, number: int
) -> None:
    mount = healfs_mount(server.uri())
    with control(mount) as disk:
        with _running(program, mount.file, server, disk) as pid:
            os.kill(pid, number)
        _ends_in_order(mount, disk)


@pytest.mark.parametrize("program", ["fio libaio", "fio io_uring", "qemu"])
def test_a_program_that_catches_sigterm_and_waits_goes_with_fail(
    server: NbdServer, healfs_mount: Mounter, program: str
) -> None:
    """It is not killed, nobody can see that it wants to end: its requests are answered as ever."""
    mount = healfs_mount(server.uri())
    with control(mount) as disk:
        with _running(program, mount.file, server, disk) as pid:
            os.kill(pid, signal.SIGTERM)
            # As it ends it may send more, as QEMU does a flush: that waits again.
            wait_until(
                lambda: disk.execute("healfs-fail") and _is_gone(pid), f"{program} to go", PATIENCE
            )
        _ends_in_order(mount, disk)


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGABRT, signal.SIGKILL])
@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_ends_with_requests_on_their_way_is_gone(
    server: NbdServer, healfs_mount: Mounter, way: str, number: int | None
) -> None:
    """Without a number it exits by itself."""
    mount = healfs_mount(server.uri())
    with control(mount) as disk:
        server.kill()
        caller = Caller(mount.file, way, DEPTH)
        try:
            caller.submitted()
            disk.parked(DEPTH)
            if number is None:
                caller.exit()
            else:
                caller.process.send_signal(number)
            assert caller.process.wait(GONE) == -(number or 0)
        finally:
            caller.close()
        _ends_in_order(mount, disk)


def test_a_program_whose_thread_waits_is_replaced_by_another(
    server: NbdServer, healfs_mount: Mounter
) -> None:
    """execve(2) waits until the other threads have ended; the one that called it lives on."""
    mount = healfs_mount(server.uri())
    with control(mount) as disk:
        server.kill()
        caller = Caller(mount.file, "threads", DEPTH)
        try:
            caller.submitted()
            disk.parked(DEPTH)
            caller.execute()
            assert caller.process.wait(GONE) == 0
        finally:
            caller.close()
        _ends_in_order(mount, disk)


@pytest.mark.parametrize("numbers", [[signal.SIGQUIT], [signal.SIGUSR1, signal.SIGTERM]])
def test_a_dd_that_a_signal_will_end_is_gone(
    server: NbdServer, healfs_mount: Mounter, numbers: list[int]
) -> None:
    """dd catches SIGUSR1; what comes behind that, and what dumps core, the kernel makes no SIGKILL
    of while dd waits."""
    mount = healfs_mount(server.uri())
    with control(mount) as disk:
        with _running("dd", mount.file, server, disk) as pid:
            for number in numbers:
                os.kill(pid, number)
        _ends_in_order(mount, disk)


# --- promise 9's two exceptions: the kernel's lock of the file -----------------------------------


@contextmanager
def _behind(
    server: NbdServer, mount: HealfsMount, agent: Opener, first: Sequence[object]
) -> Iterator[tuple[Control, Agent, Agent]]:
    """A process whose call is parked, and one that waits in the kernel behind it."""
    holder, other = agent(mount.file), agent(mount.file)
    server.kill()
    with control(mount) as disk:
        holder.ask(*first)  # type: ignore[arg-type]
        disk.parked(1)
        yield disk, holder, other


def _waits_in_the_kernel(one: Agent) -> bool:
    """In the call that it was asked for: it may read its own program from the disk before."""
    process = Path(f"/proc/{one.process.pid}")
    call = process.joinpath("syscall").read_text().split()[0]
    state = process.joinpath("stat").read_text().rpartition(")")[2].split()[0]
    return call in (PWRITE64, FSYNC) and state == "D"


EXCEPTIONS = [
    pytest.param(("fsync",), ("pwrite", 0, BLOCK), id="a write behind an fsync"),
    pytest.param(("pwrite", 0, BLOCK), ("fsync",), id="an fsync behind a write"),
]


@pytest.mark.parametrize("way_out", ["the first one goes", "fail"])
@pytest.mark.parametrize(("first", "second"), EXCEPTIONS)
def test_who_waits_behind_anothers_lock_goes_when_that_one_does(
    server: NbdServer,
    healfs_mount: Mounter,
    agent: Opener,
    first: Sequence[object],
    second: Sequence[object],
    way_out: str,
) -> None:
    mount = healfs_mount(server.uri())
    with _behind(server, mount, agent, first) as (disk, holder, other):
        other.ask(*second)  # type: ignore[arg-type]
        wait_until(lambda: _waits_in_the_kernel(other), "the second one to wait", PATIENCE)
        assert disk.status()["requests"]["parked"] == 1  # healfs does not see it
        other.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            other.process.wait(2.5)  # two looks at who waits
        if way_out == "fail":
            assert disk.execute("healfs-fail") == {"failed": 1}
            assert holder.answer(GONE).errno
        else:
            holder.kill()
            holder.process.wait(GONE)
        assert other.process.wait(GONE) == -signal.SIGKILL
        holder.kill()
        holder.process.wait(GONE)
        _ends_in_order(mount, disk)
