"""fio verifies a disk whose worker is killed again and again: at random, and at named points."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from healfs.control.client import ControlError, connect
from tests.backends.nbd_servers import NbdServer, qemu_nbd, wait_until
from tests.conftest import Mounter
from tests.fuse.control import Control
from tests.killpoints import IN_FLIGHT, OUTAGE, SUCCESSOR, KillPoints
from tests.killpoints import kill_points as kill_points
from tests.mounts import HealfsMount, Status

SECONDS = 240.0
TRIES = 10
MEGABYTES = 32
# Each writes MEGABYTES and reads it back, with fsyncs between.
CALLERS = {
    "libaio": ("--ioengine=libaio", "--iodepth=32", f"--size={MEGABYTES}M"),
    "io_uring": ("--ioengine=io_uring", "--iodepth=32", f"--size={MEGABYTES}M"),
    "psync": (
        *("--ioengine=psync", "--numjobs=16", "--thread", "--group_reporting"),
        *(f"--size={MEGABYTES // 16}M", f"--offset_increment={MEGABYTES // 16}M"),
    ),
}
# Over and over until the file STOP is there, each time with bytes of its own: what is left of an
# earlier pass is wrong. By turns each block is read back soon, and all when all were written.
PASSES = """
number=1
until [ -e "$STOP" ]; do
    [ $((number % 2)) = 0 ] && soon= || soon=--verify_backlog=64
    timeout --foreground -s KILL 800 "$@" $soon \\
        --verify_pattern="0x$(printf %08x $number)%o" || exit
    number=$((number + 1))
done
"""


class Load:
    def __init__(self, file: Path, caller: str, directory: Path) -> None:
        self.stop = directory / "stop"
        self.said = directory / "fio.txt"
        fio = (
            *("fio", "--name=verify", f"--filename={file}", "--allow_file_create=0"),
            *("--direct=1", "--invalidate=0", "--fallocate=none", "--rw=randwrite"),
            *("--bsrange=4k-64k", "--verify=pattern", "--verify_fatal=1"),
            *("--verify_state_save=0", "--fsync=64", *CALLERS[caller]),
        )
        with open(self.said, "w") as said:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "sh", "-c", PASSES, "passes", *fio],
                env=os.environ | {"STOP": str(self.stop)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd=directory,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        """Its status: 0 when all that was read was right."""
        self.stop.touch()
        return self.process.wait(800)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(SECONDS)


class Kills:
    """Kills workers of a mount under load, and sees that I/O goes on."""

    def __init__(self, mount: HealfsMount, load: Load, points: KillPoints) -> None:
        self.load = load
        self.points = points
        self.control: str = mount.status()["control"]
        self.dead: set[int] = set()

    def status(self) -> Status | None:
        """None: the worker died before it had answered."""
        try:
            with connect(self.control, SECONDS) as client:
                return Control(client).status()
        except ControlError:
            return None

    def _answering(self, requests: int) -> int | None:
        """The pid of a worker that has answered so many."""
        assert self.load.running, self.load.said.read_text()
        status = self.status()
        if status is None or status["pids"]["worker"] in self.dead:
            return None
        totals = status["totals"]
        done = sum(totals[kind]["requests"] for kind in ("read", "write"))
        return int(status["pids"]["worker"]) if done >= requests else None

    def answered(self, requests: int) -> int:
        """Wait until a worker that lives has answered so many; its pid."""
        found: list[int | None] = []

        def reached() -> bool:
            found[:] = [self._answering(requests)]
            return found[0] is not None

        wait_until(reached, f"{requests} answers of a worker", SECONDS)
        assert found[0] is not None
        return found[0]

    def kill(self, requests: int = 1) -> None:
        pid = self.answered(requests)
        os.kill(pid, signal.SIGKILL)
        self.dead.add(pid)

    def at(
        self,
        name: str,
        count: int,
        attack: Callable[[], None] = lambda: None,
        manner: str = "SIGKILL",
    ) -> None:
        """A worker ends there, with requests under way; `attack` is what brings it there."""
        self.answered(1)
        self.points.arm((name, count), manner=manner)
        attack()
        self._died(name)

    def successor_at(self, name: str, count: int) -> None:
        """The successor of one that died with requests under way dies there."""
        first, passing = next(iter(IN_FLIGHT.items()))
        for _ in range(TRIES):  # again when less was under way than the point asks for
            self.answered(1)
            self.points.arm((first, passing), (name, count))
            self._died(first)
            wait_until(self._point_or_answer, "a point, or an answer", SECONDS)
            if self.points.pending:
                self.dead.add(self.points.reached(name)["pid"])
                return
        raise AssertionError(f"{name} was not reached in {TRIES} tries")

    def _died(self, name: str) -> None:
        wait_until(lambda: self.points.pending or not self.load.running, name, SECONDS)
        assert self.points.pending, self.load.said.read_text()
        reached = self.points.reached(name)
        self.dead.add(reached["pid"])
        assert reached["held"], "nothing was under way"

    def _point_or_answer(self) -> bool:
        return self.points.pending or self._answering(1) is not None


def _through_kills(
    mount: HealfsMount,
    server: NbdServer | None,
    caller: str,
    points: KillPoints,
    counts: tuple[int, int],
) -> None:
    """`counts`: so many kills at random, and so many at each point there is."""
    rng = random.Random(caller)
    load = Load(mount.file, caller, points.directory)
    try:
        kills = Kills(mount, load, points)
        at_random, at_each = counts
        for _ in range(at_random):
            kills.kill(rng.randrange(1, 1000))
        for _ in range(at_each):
            for name, count in IN_FLIGHT.items():
                kills.at(name, count)
            for name, count in SUCCESSOR.items():
                kills.successor_at(name, count)
            if server is not None:
                for name, count in OUTAGE.items():
                    kills.at(name, count, server.kill)
                    server.start()
        kills.answered(1)  # every kill is followed by progress, the last one, too
        assert load.end() == 0, load.said.read_text()
    finally:
        load.kill()
    status = mount.status()
    assert status["state"] == "ready"
    assert status["worker_restarts"] == len(kills.dead)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.img"
    with open(path, "xb") as file:
        file.truncate(MEGABYTES << 20)
    return path


@contextlib.contextmanager
def _mounted(
    backend: str, large: Path, healfs_mount: Mounter
) -> Iterator[tuple[HealfsMount, NbdServer | None]]:
    if backend == "file":
        yield healfs_mount(large, "--slow-after", "1h"), None
        return
    # Not nbdkit: 1.32 dies by an assertion when a client goes amid a reply.
    with qemu_nbd(large, limit=3600) as server:
        yield healfs_mount(server.uri(), "--settle", "1s", "--slow-after", "1h"), server


BACKENDS = ["file", "nbd"]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fio_verifies_through_kills(
    large: Path, healfs_mount: Mounter, kill_points: KillPoints, backend: str, caller: str
) -> None:
    with _mounted(backend, large, healfs_mount) as (mount, server):
        _through_kills(mount, server, caller, kill_points, (5, 1))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fio_verifies_through_twenty_kills(
    large: Path, healfs_mount: Mounter, kill_points: KillPoints, backend: str, caller: str
) -> None:
    with _mounted(backend, large, healfs_mount) as (mount, server):
        _through_kills(mount, server, caller, kill_points, (20, 20))
