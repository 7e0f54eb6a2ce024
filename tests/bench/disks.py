"""The disks that are measured side by side: a file, and who serves it.

Each is a context manager that gives the file for fio; all processes end with it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import nbd

from tests.bench.load import DISK_BYTES
from tests.mounts import HEALFS, ROOT, HealfsMount

SWITCH = Path(__file__).parent / "switch"
BLOCK = os.urandom(4096)
DEADLINE = 30.0  # seconds for a server to be there, or to end
LIMIT = 4 * 3600.0  # seconds of a mount of healfs: longer than a group of rows takes

Disk = Callable[[Path], AbstractContextManager[Path]]


def backing_file(directory: Path, size: int = DISK_BYTES) -> Path:
    """In the page cache and on the disk, no hole: a first write of a block is like any other.

    Written by 4 KiB: longer writes leave large folios, and then what is measured in a random
    write is ext4's walk through all blocks of one (tried: a third of the time).
    """
    path = directory / "backing.img"
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 12):
            file.write(BLOCK)
        os.fsync(file.fileno())
    return path


@contextlib.contextmanager
def process(*command: str | Path, quiet: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    stderr = subprocess.DEVNULL if quiet else None
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def wait_for(holds: Callable[[], bool], what: str, running: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + DEADLINE
    while not holds():
        if running.poll() is not None:
            raise RuntimeError(f"{what} ended at once, with {running.returncode}")
        if time.monotonic() > until:
            raise TimeoutError(f"{what} is not there after {DEADLINE:g} s")
        time.sleep(0.01)


@contextlib.contextmanager
def nbdkit(
    directory: Path, *plugin: str | Path, quiet: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server and its NBD URI."""
    path = directory / "nbd.sock"
    with process("nbdkit", "-f", "-U", path, *plugin, quiet=quiet) as server:
        uri = f"nbd+unix:///?socket={path}"
        wait_for(lambda: _answers(uri), "nbdkit", server)
        yield server, uri


def _answers(uri: str) -> bool:
    """The socket's file is there a moment before anybody listens."""
    handle = nbd.NBD()
    try:
        handle.connect_uri(uri)
        handle.shutdown()
    except nbd.Error:
        return False
    return True


@contextlib.contextmanager
def nbdkit_memory(directory: Path) -> Iterator[str]:
    """Its memory is written before anything is measured."""
    with nbdkit(directory, "memory", str(DISK_BYTES)) as (_, uri):
        handle = nbd.NBD()
        handle.connect_uri(uri)
        for offset in range(0, DISK_BYTES, 1 << 20):
            handle.pwrite(os.urandom(1 << 20), offset)
        handle.shutdown()
        yield uri


@contextlib.contextmanager
def healfs_mount(
    source: str | Path, switch: str, tree: Path | None, *options: str
) -> Iterator[HealfsMount]:
    """`switch` is for the worker (see switch/sitecustomize.py), `tree` another source tree."""
    with mock.patch.dict(os.environ, _environment(switch, tree)):
        mount = HealfsMount(source, *options, limit=LIMIT)
    with contextlib.closing(mount):
        yield mount


def _environment(switch: str, tree: Path | None) -> dict[str, str]:
    # Safe path: else `python -m` finds the working directory before another source tree.
    paths = [str(path) for path in (SWITCH if switch else None, tree, ROOT) if path]
    return {
        "HEALFS_BENCH_SWITCH": switch,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": ":".join(paths),
    }


def why_plain(tree: Path | None = None) -> str:
    """Why this healfs is plain Python; "": it is compiled."""
    # Asked of an old tree, the editable installation would answer for this one.
    if not ((tree or ROOT) / "healfs/compiled.py").exists():
        return "it has nothing that can be compiled"
    asking = "from healfs.compiled import why_plain; print(why_plain)"
    return subprocess.run(
        (HEALFS.parent / "python", "-c", asking),
        env=os.environ | _environment("", tree),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()


def healfs_file(switch: str = "", tree: Path | None = None) -> Disk:
    @contextlib.contextmanager
    def disk(directory: Path) -> Iterator[Path]:
        with healfs_mount(backing_file(directory), switch, tree) as mount:
            yield mount.file

    return disk


def healfs_nbd(switch: str = "", tree: Path | None = None) -> Disk:
    @contextlib.contextmanager
    def disk(directory: Path) -> Iterator[Path]:
        with nbdkit_memory(directory) as uri, healfs_mount(uri, switch, tree) as mount:
            yield mount.file

    return disk


def qemu_file(aio: str) -> Disk:
    """qemu-storage-daemon's FUSE export, on the page cache."""

    @contextlib.contextmanager
    def disk(directory: Path) -> Iterator[Path]:
        backing = backing_file(directory)
        mountpoint = directory / "disk.img"
        mountpoint.touch()
        command = (
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=disk,filename={backing},aio={aio}"),
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={mountpoint},writable=on",
        )
        with process(*command) as daemon:
            wait_for(lambda: mountpoint.stat().st_size > 0, "qemu-storage-daemon", daemon)
            yield mountpoint

    return disk


@contextlib.contextmanager
def mounting(directory: Path, *command: str | Path) -> Iterator[Path]:
    """`command`, which shows disk.img in the directory's mnt."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    with process(*command) as running:
        try:
            wait_for(mountpoint.is_mount, Path(command[0]).name, running)
            yield mountpoint / "disk.img"
        finally:
            subprocess.run(("umount", "-q", "-l", mountpoint), check=False)


def nbdfuse(directory: Path, uri: str) -> AbstractContextManager[Path]:
    return mounting(directory, "nbdfuse", directory / "mnt" / "disk.img", uri)


@contextlib.contextmanager
def nbdfuse_nbd(directory: Path) -> Iterator[Path]:
    with nbdkit_memory(directory) as uri, nbdfuse(directory, uri) as file:
        yield file


@contextlib.contextmanager
def nbdfuse_file(directory: Path) -> Iterator[Path]:
    backing = backing_file(directory)
    with nbdkit(directory, "file", backing) as (_, uri), nbdfuse(directory, uri) as file:
        yield file


def limit(directory: Path, source: Path) -> AbstractContextManager[Path]:
    """What /dev/fuse allows, with a file or the socket of an NBD server: see limit.c."""
    program = directory / "limit"
    text = Path(__file__).parent / "limit.c"
    subprocess.run(("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, text), check=True)
    return mounting(directory, program, source, directory / "mnt")


@contextlib.contextmanager
def limit_file(directory: Path) -> Iterator[Path]:
    with limit(directory, backing_file(directory)) as file:
        yield file


@contextlib.contextmanager
def limit_nbd(directory: Path) -> Iterator[Path]:
    with nbdkit_memory(directory), limit(directory, directory / "nbd.sock") as file:
        yield file
