"""Memory of the worker: idle, and for each parked request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.bench.disks import healfs_mount, nbdkit, process
from tests.bench.load import DISK_BYTES

REQUESTS = 4000


@dataclass(frozen=True)
class Memory:
    """Bytes. `log` is what lies in the log's memory, which is shared with the keeper."""

    idle: int
    idle_log: int
    parked_write: float  # besides its payload, which lies in the log
    parked_read: float


def _resident(pid: int) -> tuple[int, int]:
    """(anonymous and file pages, shared memory) of a process, in bytes."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith(("Rss", "Vm")):
            fields[name] = int(value.split()[0]) << 10
    return fields["RssAnon"] + fields["RssFile"], fields["RssShmem"]


def _parked(directory: Path, pattern: str) -> tuple[int, int, float]:
    """(idle, idle shared, bytes a parked request) with REQUESTS of them."""
    directory.mkdir()
    plugin = ("memory", str(DISK_BYTES))
    with nbdkit(directory, *plugin) as (server, uri), healfs_mount(uri, "", None) as mount:
        worker = mount.status()["pids"]["worker"]
        idle, idle_log = _resident(worker)
        # The server goes for good, and the requests with the mount: close() gives them up.
        server.kill()
        mount.wait_state("stalled")
        before = _resident(worker)[0]
        command = (
            *("fio", "--name=park", f"--filename={mount.file}", f"--size={DISK_BYTES}"),
            *("--direct=1", f"--rw={pattern}", "--bs=4k", "--ioengine=libaio"),
            *(f"--iodepth={REQUESTS}", f"--number_ios={REQUESTS}", "--invalidate=0"),
            *("--allow_file_create=0", "--output=/dev/null"),
        )
        with process(*command, quiet=True):  # its requests are given up
            mount.wait_until(lambda status: status["requests"]["parked"] >= REQUESTS)
            each = (_resident(worker)[0] - before) / REQUESTS
            mount.umount(force=True, check=False)
        return idle, idle_log, each


def measure(directory: Path) -> Memory:
    idle, idle_log, write = _parked(directory / "writes", "randwrite")
    _, _, read = _parked(directory / "reads", "randread")
    return Memory(idle, idle_log, write, read)
