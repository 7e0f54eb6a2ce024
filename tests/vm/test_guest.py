"""healfs below a real Linux guest (promises 1, 3, 8, 9 and 10 of healfs-semantics(7))."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import pytest

from tests.backends.nbd_servers import NbdServer, qemu_nbd, wait_until
from tests.conftest import Mounter
from tests.mounts import HealfsMount, Status, mountinfo
from tests.vm.conftest import Boot
from tests.vm.guest import Bus, Guest
from tests.vm.network import Network
from tests.vm.test_attach import attach, qemu

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

BUSES: tuple[Bus, ...] = get_args(Bus)
SIZE = 256 << 20
# Files that the guest writes by turns, "slots" in tests/vm/init.
SLOTS = 16
# Seconds by the guest's own clock.
OUTAGE = 20
# Seconds until QEMU is gone that may go.
GONE = 60

# QEMU's way to flush a file, by its number on x86-64.
FDATASYNC = 75

Failure = Literal["killed", "stopped", "partitioned"]


class Outage(NamedTuple):
    """A source for healfs mount, and how to take what is behind it away and give it back."""

    source: str
    begin: Callable[[], object]
    end: Callable[[], object]


class Outages(Protocol):
    def __call__(self, failure: Failure) -> Outage: ...


def sparse(path: Path) -> Path:
    path.touch()
    os.truncate(path, SIZE)
    return path


def work(guest: Guest) -> None:
    """A file system on the disk and the writer under way."""
    guest.ask("prepare", "MADE 0", 400)
    guest.ask("mount", "MOUNTED 0", 240)
    guest.send("write")
    guest.wait_line(r"FILE .*", 240, count=3)


def assert_nothing_noticed(guest: Guest) -> None:
    """The guest's own view at the end: no error, ext4 read-write, every synced byte there."""
    guest.ask("stop", "STOPPED", 240)
    guest.ask("report", "REPORTED", 240)
    assert guest.said(r"MOUNT .*") == ["MOUNT rw"]
    assert_all_there(guest)
    assert guest.said(r"KERNEL .*|(WRITE|READ)-ERROR .*") == []
    guest.power_off(240)


def assert_all_there(guest: Guest, but: Set[str] = frozenset()) -> None:
    """e2fsck is content, and the files have what was synced; those in `but` may have anything."""
    since = guest.mark()
    guest.ask("verify", "VERIFIED", 400)
    assert guest.said(r"(TRIMMED|UMOUNTED|FSCK|REMOUNTED) .*", since) == [
        "TRIMMED 0",
        "UMOUNTED 0",
        "FSCK 0",
        "REMOUNTED 0",
    ]
    sums = dict(line.split()[1:] for line in guest.said(r"SUM \d+ [0-9a-f]{64}", since))
    assert {slot: sum for slot, sum in sums.items() if slot not in but} == {
        slot: sum for slot, sum in guest.sums().items() if slot not in but
    }
    guest.ask("report", "REPORTED", 240)


@pytest.fixture
def outages(tmp_path: Path) -> Iterator[Outages]:
    """Makes the one NBD server of a test, and the way in which it will fail."""
    with ExitStack() as stack:

        def make(failure: Failure) -> Outage:
            image = sparse(tmp_path / "image")
            if failure == "partitioned":
                if os.geteuid() != 0:
                    pytest.skip("a network namespace needs root")
                network = stack.enter_context(Network())
                server = NbdServer(
                    lambda server: [
                        *network.inside,
                        *("qemu-nbd", "-f", "raw", "-t", "-e", "16", "--discard=unmap"),
                        *("-b", network.address, "-p", str(server.port), str(image)),
                    ],
                    tcp=True,
                )
                # Nobody waits for it here: healfs mount does.
                server.spawn()
                stack.callback(server.close)
                return Outage(f"nbd://{network.address}:{server.port}", network.down, network.up)
            server = stack.enter_context(qemu_nbd(image, "--discard=unmap"))
            if failure == "stopped":
                return Outage(server.uri(), server.pause, server.resume)
            return Outage(server.uri(), server.kill, server.start)

        yield make


def system_calls(pid: int) -> set[str]:
    """The numbers of the system calls that the process's threads wait in."""
    calls = set()
    for file in Path(f"/proc/{pid}/task").glob("*/syscall"):
        # Idle threads of QEMU's pool end when they like.
        with suppress(OSError):
            calls.add(file.read_text().split()[0])
    return calls


def assert_qemu_answers(guest: Guest) -> None:
    """QEMU's main loop turns, and the device has not been stopped below the guest."""
    assert guest.qmp("query-status", deadline=60)["status"] == "running"
    [device] = guest.qmp("query-block", deadline=60)
    assert device["inserted"]["image"]["filename"]
    guest.qmp("query-blockstats", deadline=60)


def sit_out(
    mount: HealfsMount,
    guest: Guest,
    outage: Outage,
    seconds: int = OUTAGE,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """An outage under the writer: stalled, the guest alive and waiting, then going on."""
    outage.begin()
    mount.wait_until(waiting, 120)
    meanwhile()
    since = guest.mark()
    assert_qemu_answers(guest)
    guest.wait_line(r"BEAT \d+", 120 + 15 * seconds, since, count=seconds)
    # One may have been on its way through the serial port.
    assert len(guest.said(r"FILE .*", since)) <= 1
    assert waiting(mount.status())
    assert_qemu_answers(guest)
    outage.end()
    go_on(mount, guest)


def go_on(mount: HealfsMount, guest: Guest) -> None:
    since = guest.mark()
    guest.wait_line(r"FILE .*", 400, since, count=3)
    mount.wait_state("ready")


def waiting(status: Status) -> bool:
    requests = status["requests"]
    return bool(status["state"] == "stalled" and requests["parked"] + requests["in_flight"])


# Every failure on every bus; `make test` has each failure once, on either bus; "killed" it has
# below, with more.
QUICK = {("virtio-scsi", "stopped"), ("virtio-blk", "partitioned")}
CASES = [
    pytest.param(bus, failure, marks=() if (bus, failure) in QUICK else pytest.mark.soak)
    for failure in get_args(Failure)
    for bus in BUSES
]


@pytest.mark.parametrize(("bus", "failure"), CASES)
def test_guest_does_not_notice_an_outage(
    healfs_mount: Mounter, boot: Boot, outages: Outages, bus: Bus, failure: Failure
) -> None:
    outage = outages(failure)
    mount = healfs_mount(outage.source, "--slow-after", "10s")
    guest = boot(mount, bus)
    work(guest)
    before = mount.status()["outages"]["count"]  # of a machine that stood still, say
    sit_out(mount, guest, outage)
    assert mount.status()["outages"]["count"] == before + 1
    assert_nothing_noticed(guest)
    mount.umount()


@pytest.mark.parametrize("bus", ["virtio-blk", pytest.param("virtio-scsi", marks=pytest.mark.soak)])
def test_guest_does_not_notice_a_kill_an_upgrade_and_an_outage_at_once(
    healfs_mount: Mounter, boot: Boot, outages: Outages, bus: Bus
) -> None:
    outage = outages("killed")
    mount = healfs_mount(outage.source, "--slow-after", "1h")
    guest = boot(mount, bus)
    work(guest)

    def replace_the_worker() -> None:
        old = mount.status()["pids"]["worker"]
        os.kill(old, signal.SIGKILL)
        now = mount.wait_until(lambda status: waiting(status) and worker(status) != old, 180)
        mount.run("upgrade", str(mount.mountpoint), timeout=180)
        mount.wait_until(lambda status: waiting(status) and worker(status) != worker(now), 180)

    sit_out(mount, guest, outage, meanwhile=replace_the_worker)
    assert mount.status()["outages"]["count"] == 1
    assert_nothing_noticed(guest)
    assert_nothing_left(mount, healfs_mount, outage.source)


def worker(status: Status) -> int:
    return int(status["pids"]["worker"])


@pytest.mark.soak
@pytest.mark.parametrize("failure", get_args(Failure))
def test_guest_does_not_notice_many_outages(
    healfs_mount: Mounter, boot: Boot, outages: Outages, failure: Failure
) -> None:
    outage = outages(failure)
    mount = healfs_mount(outage.source, "--slow-after", "2s")
    guest = boot(mount)
    work(guest)
    for _ in range(12):
        sit_out(mount, guest, outage, seconds=2)
    assert mount.status()["outages"]["count"] == 12
    assert_nothing_noticed(guest)
    mount.umount()


@pytest.mark.parametrize("bus", [pytest.param("virtio-blk", marks=pytest.mark.soak), "virtio-scsi"])
def test_qemu_answers_with_a_flush_parked(
    healfs_mount: Mounter, boot: Boot, outages: Outages, bus: Bus
) -> None:
    """The kernel holds the file's inode lock meanwhile; with aio=threads QEMU lives on."""
    outage = outages("killed")
    mount = healfs_mount(outage.source)
    guest = boot(mount, bus)
    work(guest)
    guest.ask("pause", "PAUSED", 240)
    guest.ask("overwrite", "OVERWRITTEN 0", 240)  # QEMU sends no flush where nothing is written
    outage.begin()
    mount.wait_state("stalled")
    since = guest.mark()
    guest.send("flush")
    # Not alone, perhaps: the guest's kernel reads and writes when it likes.
    wait_until(lambda: str(FDATASYNC) in system_calls(guest.pid), "the flush", 120)
    assert_qemu_answers(guest)
    guest.wait_line(r"BEAT \d+", 240, since, count=3)
    assert guest.said(r"FLUSHED .*", since) == []
    outage.end()
    guest.wait_line("FLUSHED 0", 240, since)
    guest.send("resume")
    go_on(mount, guest)
    assert_nothing_noticed(guest)
    mount.umount()


def test_guest_notices_when_the_policy_says_report(
    healfs_mount: Mounter, boot: Boot, outages: Outages
) -> None:
    """The control: without retry the same outage turns ext4 read-only."""
    outage = outages("killed")
    mount = healfs_mount(outage.source, "--werror", "report", "--rerror", "report")
    guest = boot(mount)
    work(guest)
    outage.begin()
    guest.wait_line(r"WRITE-ERROR .*", 240)
    # The pause brings a sync, so that the journal fails as well; ext4 acts on that
    # when it is next written to.
    guest.ask("pause", "PAUSED", 240)
    since = guest.mark()
    guest.send("resume")
    guest.wait_line(r"WRITE-ERROR .*", 240, since, count=2)
    guest.ask("stop", "STOPPED", 240)
    guest.ask("report", "REPORTED", 240)
    assert guest.said(r"MOUNT .*") == ["MOUNT ro"]
    assert guest.said(r"KERNEL .*I/O error.*")
    assert guest.said(r"KERNEL .*Remounting filesystem read-only.*")


def assert_nothing_left(mount: HealfsMount, mounter: Mounter, source: str) -> None:
    """It is unmounted without force; no mount, process, socket or lock of it is left."""
    mount.umount()
    assert str(mount.mountpoint) not in [fields[4] for fields in mountinfo()]
    assert mount.processes() == []
    # What is kept for reading afterwards: healfs events, and the log.
    assert {path.name for path in mount.runtime.iterdir()} <= {"events", "log"}
    mounter(source).umount()


def test_killed_guest_is_let_go(healfs_mount: Mounter, boot: Boot, outages: Outages) -> None:
    """kill -9 of QEMU during an outage: its process ends, and nothing of it stays parked."""
    outage = outages("killed")
    mount = healfs_mount(outage.source)
    guest = boot(mount)
    work(guest)
    outage.begin()
    mount.wait_until(waiting)
    guest.kill()
    guest.gone(GONE)
    mount.wait_until(lambda status: status["requests"]["parked"] == 0)
    outage.end()
    mount.wait_state("ready")
    assert_nothing_left(mount, healfs_mount, outage.source)


def test_guest_is_reset_in_an_outage(healfs_mount: Mounter, boot: Boot, outages: Outages) -> None:
    """QEMU waits for what is in flight before it resets."""
    outage = outages("killed")
    mount = healfs_mount(outage.source)
    guest = boot(mount)
    work(guest)
    outage.begin()
    mount.wait_until(waiting)
    guest.reset()
    last = int(guest.said(r"FILE .*")[-1].split()[1])
    assert waiting(mount.status())
    since = guest.mark()
    outage.end()
    guest.wait_line(r"READY .*", 400, since)
    # Of the guest before the reset nothing waits any more; the one after it reads and writes.
    mount.wait_until(lambda status: not any(status["requests"].values()))
    guest.ask("mount", "MOUNTED 0", 240)
    assert_all_there(guest, but={str((last + 1) % SLOTS)})
    assert guest.said(r"KERNEL .*") == []
    guest.power_off(240)
    assert_nothing_left(mount, healfs_mount, outage.source)


def test_guest_is_ended_in_an_outage(healfs_mount: Mounter, boot: Boot, outages: Outages) -> None:
    """QEMU waits for what is in flight before it quits: the way out is a policy."""
    outage = outages("killed")
    mount = healfs_mount(outage.source)
    guest = boot(mount)
    work(guest)
    outage.begin()
    mount.wait_until(waiting)
    with suppress(TimeoutError):
        guest.qmp("quit", deadline=1)
    mount.policy("--rerror", "report", "--werror", "report")
    guest.gone(GONE)
    assert mount.status()["requests"]["parked"] == 0
    outage.end()
    mount.wait_state("ready")
    assert_nothing_left(mount, healfs_mount, outage.source)


def test_disk_is_unplugged_in_an_outage(
    healfs_mount: Mounter, outages: Outages, tmp_path: Path
) -> None:
    """QEMU waits for what is in flight, and then has let go of the file."""
    outage = outages("killed")
    mount = healfs_mount(outage.source)
    with (
        qemu(attach(mount, "--bus", "scsi"), tmp_path) as monitor,
        ThreadPoolExecutor(1) as pool,
    ):
        [disk] = monitor.execute("query-block")
        node = disk["inserted"]["node-name"]
        outage.begin()
        write = f'qemu-io -d {disk["qdev"]} "aio_write 0 4096"'
        monitor.execute("human-monitor-command", {"command-line": write})
        mount.wait_until(waiting)
        unplugged = pool.submit(monitor.execute, "device_del", {"id": node})
        assert waiting(mount.status()) and not unplugged.done()
        outage.end()
        unplugged.result(180)
        monitor.wait_event("DEVICE_DELETED", timeout=180)
        monitor.execute("blockdev-del", {"node-name": node})
        mount.wait_state("ready")
        assert_nothing_left(mount, healfs_mount, outage.source)


@pytest.mark.soak
@pytest.mark.parametrize("bus", BUSES)
def test_guest_on_a_plain_file(boot: Boot, tmp_path: Path, bus: Bus) -> None:
    """The guest and its checks by themselves, without healfs."""
    guest = boot(sparse(tmp_path / "disk"), bus)
    work(guest)
    guest.ask("pause", "PAUSED", 30)
    guest.ask("flush", "FLUSHED 0", 30)
    assert_qemu_answers(guest)
    since = guest.mark()
    guest.send("resume")
    guest.wait_line(r"FILE .*", 60, since)
    guest.wait_line(r"BEAT .*", 30, since)
    assert_nothing_noticed(guest)
